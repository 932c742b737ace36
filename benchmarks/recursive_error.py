"""What re-quantization at every update does: the state goes through A <- 0.95 A + 0.05 G G^T again and again.

Two tables: the error of the root after 100 updates, for each form and two values of eps; and the recovery from one
gradient that is a million times too large. (The drift over 1000 updates is in benchmarks.storage.)
"""

import argparse
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.matrices import bits_per_element, exact_root, log_spaced, relative_error, statistics
from benchmarks.report import keep, show
from lowbit_optim.presets import WANG2024
from lowbit_optim.storage import Quantization, Symmetric
from lowbit_optim.storage.budget import BITS, form
from lowbit_optim.storage.eigen import Eigen, Rows
from lowbit_optim.storage.factors import Dense, Direct, Factor, State
from lowbit_optim.storage.root import Root

DECAY = 0.95
WIDTHS = tuple(bits for bits in BITS if bits <= 8)


def root_form(bits: float, **shared: Any) -> Factor:
    """The root form at a budget, as ``Shampoo(bits=...)`` would keep it."""
    eigen = {"rectify_update": 1, "rectify_root": 4, "orthogonal_iterations": 1}
    return form("root", bits, None, "triangle", True, **eigen, **shared)


def forms(eps: float) -> dict[str, Factor]:
    """The forms of the first table."""
    paper: Any = {"eps": eps} | {key: WANG2024[key] for key in ("initial_scale", "statistic_limit")}
    four = Quantization(4, "linear-2")
    square = Symmetric(four, "square")
    nf4 = Symmetric(Quantization(4, "nf", double=True, scale="fitted"))
    return {
        "dense: A and root, exact": Dense(eps=eps),
        "eigen: U in float32, one QR per update": Eigen(vectors=Rows(None), codec=Symmetric(), **paper),
        "eigen: U 4-bit, rectified, root 4-bit square (the paper)": Eigen(vectors=Rows(four), codec=square, **paper),
        "direct: A and root 4-bit squares (naive)": Direct(codec=square, **paper),
        **{f"root: bits={bits}": root_form(bits, eps=eps) for bits in WIDTHS},
        "root: A^(-1/8), NormalFloat-4": Root(codec=nf4, stored_power=8, eps=eps),
    }


def fourth_root(factor: Factor, state: State) -> Tensor:
    """A^(-1/4) as the form gives it back."""
    return factor.root(state, torch.float32).double()


def advance(factor: Factor, state: State, m: Tensor, magnitude: float = 1.0) -> State:
    """One update, and a refresh where the form has one."""
    state = factor.update(state, m.float(), torch.full((len(m),), magnitude, device=m.device))
    return state if factor.one_period else factor.refresh(state, torch.float32)


def averages(stream: Iterable[Tensor], initial_scale: float = 0.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Each statistic with the float64 average that a form with that initial scale aims at."""
    weight, a = float(initial_scale > 0), torch.zeros((), dtype=torch.float64)
    for m in stream:
        if initial_scale and a.dim() == 0:
            a = initial_scale * torch.eye(m.shape[-1], dtype=m.dtype).expand_as(m)
        weight = DECAY * weight + 1 - DECAY
        a = a + (1 - DECAY) / weight * (m - a)
        yield m, a


def error_table(order: int, seeds: range) -> list[dict[str, Any]]:
    """Recursive error after 100 updates."""
    rows: dict[str, dict[str, Any]] = {}
    for eps in (1e-6, 1e-4):
        for label, factor in forms(eps).items():
            state = factor.init(len(seeds), order, torch.float32, "cpu")
            for m, a in averages(statistics(log_spaced(order), order // 4, seeds, 100), factor.initial_scale):
                state, mean = advance(factor, state, m), a
            size = bits_per_element(factor, order)
            row = rows.setdefault(label, {"kept between updates": label, "bits/element": size})
            row[f"NRE, eps {eps:.0e}"] = (
                relative_error(fourth_root(factor, state), exact_root(mean, factor)).mean().item()
            )
    return list(rows.values())


def top_ratio(factor: Factor, state: State, a: Tensor) -> Tensor:
    """The largest eigenvalue that the form gives back, over the true one."""
    return torch.linalg.eigvalsh(factor.statistic(state, torch.float64))[..., -1] / torch.linalg.eigvalsh(a)[..., -1]


def spike_table(order: int, seeds: range) -> list[dict[str, Any]]:
    """The 51st gradient is 1e6 times too large. The error is against an average in which it has its proper size."""
    rows = []
    forms = {"dense, no limit": Dense(statistic_limit=math.inf), "dense": Dense()}
    for label, factor in {**forms, **{f"root: bits={bits}": root_form(bits) for bits in WIDTHS}}.items():
        state = factor.init(len(seeds), order, torch.float32, "cpu")
        row: dict[str, Any] = {"one gradient times 1e6": label}
        for t, (m, a) in enumerate(averages(statistics(log_spaced(order), order // 4, seeds, 56)), 1):
            spike = t == 51
            state = advance(factor, state, m, 1e6 if spike else 1.0)
            if t >= 50 and (t <= 52 or t == 56):
                root, exact = fourth_root(factor, state), exact_root(a, factor)
                # Without its scale, which grafting removes.
                root *= ((root * exact).sum((-2, -1)) / root.square().sum((-2, -1)))[:, None, None]
                when = "before" if t == 50 else "at the spike" if spike else f"{t - 51} later"
                row[f"NRE {when}"] = relative_error(root, exact).mean().item()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", type=int, default=384, help="order of the first table (default 384)")
    parser.add_argument("--spike-order", type=int, default=128, help="order of the second table (default 128)")
    parser.add_argument("--seeds", type=int, default=3, help="streams per figure of the second table (default 3)")
    args = parser.parse_args()
    seeds = range(args.seeds)
    errors = error_table(args.order, range(1))
    show(f"Error of the root after 100 updates, order {args.order}, one stream", errors)
    spike = spike_table(args.spike_order, seeds)
    note = "Without a limit on tr(M) / tr(A) the spike owns the average; with it, it counts as one statistic."
    show(f"Recovery from one spike, order {args.spike_order}, mean of {args.seeds} streams", spike, note)
    keep("recursive_error", {"recursive": errors, "spike": spike}, vars(args))


if __name__ == "__main__":
    main()
