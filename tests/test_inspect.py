"""The command `lowbit-optim inspect`."""

import json

import pytest
import torch
from torch import nn

from lowbit_optim import AdamW, Shampoo, cli, save_checkpoint
from tests.contract import OPTIMIZERS, net, run, shampoo

KINDS = ["shampoo", "shampoo-eigen", "shampoo-32-bits", "shampoo-direct", "soap-eigen", "soap-low-bit-base", "ekfac"]


@pytest.fixture
def inspect(capsys):
    """Run the command; its exit code, what it printed, and what it said of errors."""

    def command(*arguments):
        code = cli.main(["inspect", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def saved(folder, make=shampoo, steps=4):
    model, optimizer = run(make, steps)
    save_checkpoint(folder, model=model, optimizer=optimizer, step=steps)
    return model, optimizer


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_with_its_bytes(inspect, tmp_path, name):
    model, optimizer = saved(tmp_path, OPTIMIZERS[name])
    code, out, _ = inspect(tmp_path, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["step"], found["optimizer"]) == (4, f"lowbit_optim.{type(optimizer).__name__}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = {
        f"{names[p]}/{key}": (list(value.shape), value.nbytes)
        for p, own in optimizer.state.items()
        for key, value in own.items()
    }
    rows = {row["name"]: (row["shape"], row["bytes"]) for row in found["tensors"] if row["kind"] == "optimizer"}
    assert rows == expected
    totals = {(total["kind"], total["key"]): total for total in found["totals"]}
    assert totals["optimizer", "all"]["bytes"] == sum(size for _, size in expected.values())
    assert totals["model", "all"]["bytes"] == sum(value.nbytes for value in model.state_dict().values())
    keyed = [total for total in found["totals"] if total["kind"] == "optimizer" and total["key"] != "all"]
    assert sum(total["bytes"] for total in keyed) == totals["optimizer", "all"]["bytes"]


@pytest.mark.parametrize(
    "storage", ["root", "logarithm", "spiked", "direct", "cholesky-feedback", "reflector", "eigen"]
)
def test_the_ratio_is_to_the_dense_optimizer(inspect, tmp_path, storage):
    """Whose bytes are those of a real one, of statistics, roots and moments; counters and scales are small."""
    saved(tmp_path, lambda m: shampoo(m, storage=storage, base_bits=8))
    _, dense = run(lambda m: Shampoo(m.parameters(), bits=32), 4)
    wanted = sum(
        value.nbytes
        for own in dense.state.values()
        for key, value in own.items()
        if key.endswith(("statistic", "root", "exp_avg", "exp_avg_sq"))
    )
    found = json.loads(inspect(tmp_path, "--json")[1])
    ours = [t for t in found["totals"] if t["kind"] == "optimizer" and t["key"].split(".")[-1] not in ("step", "all")]
    matrices = [t for t in ours if t["key"].split(".")[-1] not in ("updates", "failures", "previous_norm", "nonfinite")]
    assert sum(t["dense_bytes"] for t in matrices) == wanted
    assert all(t["ratio"] is None or 0 < t["ratio"] < 1.2 for t in matrices)


@pytest.mark.parametrize(("bits", "codes"), [(4, 8), (2, 4), (1, 2)])
def test_bits_of_codes(inspect, tmp_path, bits, codes):
    saved(tmp_path, lambda m: shampoo(m, bits=bits, base_bits=4))
    rows = {row["name"]: row for row in json.loads(inspect(tmp_path, "--json")[1])["tensors"]}
    assert rows["hidden.weight/left.root.codes"]["bits"] == codes
    assert rows["hidden.weight/base.exp_avg.codes"]["bits"] == 4
    assert rows["hidden.weight/left.root.diagonal"]["bits"] is None
    assert "root" in rows["hidden.weight/left.root.codes"]["codec"]


def test_bits_of_a_basis_are_those_of_its_size(inspect, tmp_path):
    saved(tmp_path, OPTIMIZERS["soap"])
    rows = {row["name"]: row for row in json.loads(inspect(tmp_path, "--json")[1])["tensors"]}
    assert rows["hidden.weight/right.basis.codes"]["bits"] == 8


def test_the_tables(inspect, tmp_path):
    saved(tmp_path)
    code, out, _ = inspect(tmp_path)
    assert code == 0
    assert "optimizer lowbit_optim.Shampoo" in out
    assert "--verify" in out
    line = next(line for line in out.splitlines() if "hidden.weight/left.root.codes" in line)
    assert "U8" in line
    assert "linear-8" in line
    assert any(line.split()[:2] == ["optimizer", "all"] for line in out.splitlines())


def test_moments_without_a_model(inspect, tmp_path):
    _, optimizer = run(lambda m: AdamW(m.parameters(), bits=4, min_quant_size=256), 2)
    save_checkpoint(tmp_path, optimizer=optimizer)
    rows = {row["name"]: row for row in json.loads(inspect(tmp_path, "--json")[1])["tensors"]}
    index = [p.shape for p in optimizer.param_groups[0]["params"]].index((36, 64))
    assert rows[f"{index}/exp_avg.codes"]["dense_bytes"] == 36 * 64 * 4


def test_verify_looks_at_tensors(inspect, tmp_path):
    saved(tmp_path)
    (file,) = tmp_path.glob("optimizer-*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert inspect(tmp_path)[0] == 0
    code, _, error = inspect(tmp_path, "--verify")
    assert code == 2
    assert file.name in error


def test_verified(inspect, tmp_path):
    saved(tmp_path)
    code, out, _ = inspect(tmp_path, "--verify")
    assert code == 0
    assert "every checksum holds" in out


def test_what_is_no_checkpoint(inspect, tmp_path):
    file = tmp_path / "state.pt"
    torch.save({}, file)
    (tmp_path / "empty").mkdir()
    for path, said in (
        (file, "convert"),
        (tmp_path / "missing", "cannot be read"),
        (tmp_path / "empty", "cannot be read"),
    ):
        code, out, error = inspect(path)
        assert (code, out) == (2, "")
        assert error.startswith("lowbit-optim: error: ")
        assert said in error


def test_a_damaged_header(inspect, tmp_path):
    saved(tmp_path)
    (file,) = tmp_path.glob("optimizer-*")
    file.write_bytes(b"\xff" * 64)
    code, _, error = inspect(tmp_path)
    assert code == 2
    assert file.name in error


def test_names_cannot_talk_to_the_terminal(inspect, tmp_path):
    model = net()
    model.register_parameter("evil\x1b[2J\u202e\n", nn.Parameter(torch.ones(3)))
    save_checkpoint(tmp_path, model=model)
    code, out, _ = inspect(tmp_path)
    assert code == 0
    assert "evil\\x1b[2J\\u202e\\n" in out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert "\x1b" not in inspect(tmp_path, "--json")[1]
    code, _, error = inspect(tmp_path / "not\x1bthere")
    assert code == 2
    assert "\x1b" not in error


@pytest.mark.parametrize("kind", ["optimizer", "trainer"])
@pytest.mark.parametrize("change", ["link", "header", "size"])
def test_files_are_checked_before_they_are_read(inspect, tmp_path, kind, change):
    saved(tmp_path / "run")
    (file,) = (tmp_path / "run").glob(f"{kind}-*")
    if change == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        content = file.read_bytes()
        file.write_bytes(
            content.replace(b"lr", b"lR").replace(b"F32", b"I32") if change == "header" else content + b" "
        )
    code, out, error = inspect(tmp_path / "run")
    assert (code, out) == (2, "")
    assert file.name in error
    assert {"link": "a link", "header": "sha256", "size": "bytes, and checkpoint.json says"}[change] in error


class Sides(torch.optim.SGD):
    """An optimizer of the user's, with keys like the names of our factors."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] = {"left": torch.ones(2), "right": torch.ones(3)}


def test_keys_of_a_users_optimizer(inspect, tmp_path):
    saved(tmp_path, lambda m: Sides(m.parameters()))
    code, out, _ = inspect(tmp_path, "--json")
    assert code == 0
    assert {row["key"] for row in json.loads(out)["tensors"]} >= {"left", "right"}
