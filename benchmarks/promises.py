"""What a training loop takes for granted of an optimizer, tried with ours and with other libraries'.

    python -m benchmarks.promises     # of every peer that is installed; a minute

Each promise is a small experiment on one perceptron; "no" is what it showed, or that it raised an error, which the kept
file has. Peers are made with their own defaults, but for thresholds below which they would keep 32 bits.
"""

import argparse
import copy
import io
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import Optimizer

import lowbit_optim
from benchmarks import report
from benchmarks.memory import peer
from lowbit_optim import CASPR, EKFAC, KFAC, SOAP, AdaBK, Shampoo

Make = Callable[[nn.Module], Any]
WIDTH = 64

_often = {"statistics_frequency": 2, "min_quant_size": 1024}


def of(kind: Any, **keywords: Any) -> Make:
    return lambda model: kind(model.parameters(), lr=1e-2, **keywords)


def of_layers(kind: Any) -> Make:
    return lambda model: kind(model.parameters(), lr=1e-2, model=model, **_often)


OURS: dict[str, Make] = {
    "Shampoo": of(Shampoo, **_often, base_bits=4),
    "CASPR": of(CASPR, **_often),
    "KFAC": of_layers(KFAC),
    "AdaBK": of_layers(AdaBK),
    "EKFAC": of_layers(EKFAC),
    "SOAP": of(SOAP, **_often),
    "AdamW, 4 bits": of(lowbit_optim.AdamW, bits=4),
}
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torch AdamW": ("torch.optim", "AdamW", {}),
    "bitsandbytes AdamW8bit": ("bitsandbytes.optim", "AdamW8bit", {"min_8bit_size": 1024}),
    "torchao AdamW8bit": ("torchao.optim", "AdamW8bit", {}),
    "torchao AdamW4bit": ("torchao.optim", "AdamW4bit", {}),
    "pytorch_optimizer Shampoo": ("pytorch_optimizer", "Shampoo", {}),
    "pytorch_optimizer ScalableShampoo": ("pytorch_optimizer", "ScalableShampoo", {"start_preconditioning_step": 1}),
    "pytorch_optimizer SOAP": ("pytorch_optimizer", "SOAP", {}),
    "HeavyBall SOAP": ("heavyball", "SOAP", {}),
}


# ---- the experiments -------------------------------------------------------------------------------------------------


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)).to(dtype)


def train(model: nn.Module, optimizer: Any, steps: range, spoil: Callable[[nn.Module], None] | None = None) -> None:
    for step in steps:
        torch.manual_seed(100 + step)  # of the data, and of what an optimizer rounds at random
        x = torch.randn(32, WIDTH, dtype=next(model.parameters()).dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        if spoil is not None:
            spoil(model)
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


def after(make: Make, steps: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    model = network(dtype)
    optimizer = make(model)
    train(model, optimizer, range(steps))
    return model, optimizer


def through_a_file(state: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def opens_with_weights_only(make: Make) -> bool:
    _, optimizer = after(make, 3)
    through_a_file(optimizer.state_dict(), weights_only=True)
    return True


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for own in value.values():
            yield from leaves(own)
    elif isinstance(value, list | tuple):
        for own in value:
            yield from leaves(own)
    else:
        yield value


def is_plain(make: Make) -> bool:
    _, optimizer = after(make, 3)
    plain = (int, float, str, bool, type(None))
    return all(type(x) is Tensor or isinstance(x, plain) for x in leaves(optimizer.state_dict()["state"]))


def resumes(make: Make, dtype: torch.dtype = torch.float32) -> bool:
    whole, _ = after(make, 6, dtype)
    model, optimizer = after(make, 3, dtype)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()], weights_only=False)
    other = network(dtype)
    resumed = make(other)
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(3, 6))
    return equal(whole, other)


def resumes_in_bfloat16(make: Make) -> bool:
    return resumes(make, torch.bfloat16)


def resumes_by_dcp(make: Make) -> bool:
    """As FSDP's users do it, under flattened names."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    whole, _ = after(make, 6)
    model, optimizer = after(make, 3)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    other = network()
    resumed = make(other)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    train(other, resumed, range(3, 6))
    return equal(whole, other)


def copies(make: Make) -> bool:
    whole, _ = after(make, 6)
    model, optimizer = after(make, 3)
    if isinstance(optimizer, KFAC):  # hooks stay with the model that they are in
        model, optimizer = copy.deepcopy((model, optimizer))
        optimizer.attach(model)
    else:
        model, optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(3, 6))
    return equal(whole, model)


def survives_nan(make: Make) -> bool:
    """One gradient in one step is not finite; the weights stay finite, in that step and those after it."""

    def spoil(model: nn.Module) -> None:
        gradient = next(model.parameters()).grad
        assert gradient is not None
        gradient[0, 0] = torch.nan

    model, optimizer = after(make, 3)
    train(model, optimizer, range(3, 4), spoil)
    train(model, optimizer, range(4, 8))
    return all(bool(torch.isfinite(w).all()) for w in weights(model))


def obeys_the_rate(make: Make) -> bool:
    """With a rate of 0 in its groups, as a scheduler sets it, nothing moves."""
    model, optimizer = after(make, 3)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
    train(model, optimizer, range(3, 5))
    return all(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


def takes_a_closure(make: Make) -> bool:
    model = network()
    optimizer = make(model)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(4, WIDTH)).square().mean()
        loss.backward()
        return loss

    return isinstance(optimizer.step(closure), Tensor)


def leaves_the_unused_alone(make: Make) -> bool:
    """A parameter without a gradient stays as it is."""

    def spoil(model: nn.Module) -> None:
        next(model.parameters()).grad = None

    model, optimizer = after(make, 3)
    before = weights(model)[0]
    train(model, optimizer, range(3, 5), spoil)
    return torch.equal(before, weights(model)[0])


PROMISES: dict[str, Callable[[Make], bool]] = {
    "a torch.optim.Optimizer": lambda make: isinstance(make(network()), Optimizer),
    "state of plain tensors and numbers": is_plain,
    "opens with weights_only=True": opens_with_weights_only,
    "resumes to the last bit": resumes,
    "the same with bfloat16 parameters": resumes_in_bfloat16,
    "the same by get_/set_optimizer_state_dict, flattened": resumes_by_dcp,
    "a deep copy goes on as it would": copies,
    "a NaN in one gradient leaves weights finite": survives_nan,
    "a rate of 0 moves nothing": obeys_the_rate,
    "takes a closure": takes_a_closure,
    "leaves parameters without a gradient alone": leaves_the_unused_alone,
}


def tried(makes: dict[str, Make]) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """(a row of yes and no for each promise; for each error what it was)."""
    rows, errors = [], []
    for promise, holds in PROMISES.items():
        row = {"promise": promise}
        for name, make in makes.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    row[name] = "yes" if holds(make) else "no"
            except Exception as error:  # a peer may raise whatever it likes: that is the result
                row[name] = "error"
                said = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                errors.append({"optimizer": name, "promise": promise, "error": said})
        rows.append(row)
    return rows, errors


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    makes = dict(OURS)
    for name, (module, kind, keywords) in PEERS.items():
        if (found := peer(module, kind)) is None:
            print(f"{name} is not installed: left out")
        else:
            makes[name] = of(found, **keywords)
    rows, errors = tried(makes)
    for names in (list(OURS), [name for name in makes if name not in OURS]):
        report.show("Promises", [{"promise": row["promise"], **{name: row[name] for name in names}} for row in rows])
    for error in errors:
        print(f"{error['optimizer']}, {error['promise']}: {error['error']}")
    packages = sorted({module.partition(".")[0] for name, (module, *_) in PEERS.items() if name in makes})
    peers = [{"package": package, "version": version(package)} for package in packages]
    report.keep("promises", {"promises": rows, "errors": errors, "peers": peers})


if __name__ == "__main__":
    main()
