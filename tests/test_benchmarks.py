"""What the benchmarks compute from what they measure."""

import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from benchmarks import convergence, methods, report, scaling, steps, timing
from benchmarks.methods import FLOOR, SETS, Floor, Method, Run, gradients_of
from benchmarks.timing import Time, Turn

CPU = torch.device("cpu")
OURS = [method for method in methods.second_order([64], few=False) if method.ours]


def test_amortised_is_the_mean_of_all_steps_of_a_period():
    for t1, t2 in [(100, 500), (1, 10), (10, 10)]:
        for statistic in (7.0, None):
            cost = {0: 3.0, 1: 3.0 if statistic is None else statistic, 2: 50.0}
            taken = [cost[(step % t1 == 0) + (step % t2 == 0)] for step in range(1, t2 + 1)]
            assert timing.amortised(3.0, statistic, 50.0, (t1, t2)) == pytest.approx(statistics.fmean(taken))


def test_periods_that_do_not_meet_are_refused():
    with pytest.raises(ValueError, match=r"\(100, 250\).*multiple"):
        timing.amortised(1.0, 2.0, 3.0, (100, 250))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("one period", (1 + 99 / 100, 1 + 99 / 10)),
        ("two periods", (1 + 9 / 100 + 90 / 500, 10 + 90 / 10)),
        ("every step", (1 + 99 / 500, 1 + 99 / 10)),
    ],
)
def test_columns_of_a_row(schedule, expected):
    """An ordinary step of 1 ms, one with statistics of 10 ms and one with roots of 100 ms."""
    run = Run(Method("row", None, torch.optim.SGD, schedule=schedule), gradients_of([(8, 8)], torch.float32, CPU))
    of_kind = {"ordinary": 1.0, "statistics": 10.0, "root": 100.0}
    times = {kind: Time(of_kind[kind], 0.0) for kind in run.method.kinds}
    row = steps.row_of(run, times, first=0.5, floor=0.25, updates=3, peaks={"ordinary": 1000})
    assert [row[f"amortised {title}, CPU ms"] for title in steps.PERIODS] == pytest.approx(expected)
    assert (row["/ AdamW"], row[f"/ {FLOOR}"]) == (2.0, 4.0)
    assert (row["peak ordinary, MB"], row["peak update, MB"]) == (1e-3, None)


def test_turns_alternate_and_end_with_their_budget(monkeypatch):
    def timed(step, device):
        step()
        return Time(1.0, 1000.0 if said[-1] == "slow" else 1.0)

    said = []
    turns = {
        name: Turn(lambda: said.append("prepare"), lambda name=name: said.append(name)) for name in ("slow", "fast")
    }
    monkeypatch.setattr(timing, "timed", timed)
    taken = timing.take_turns(turns, CPU, rounds=4, warm_up=1, budget=1.5)
    each = ["prepare", "slow", "prepare", "fast"]
    assert said == 3 * each + 2 * each[2:]  # one round that is not timed, two, and two without the slow one
    assert (len(taken["slow"]), len(taken["fast"])) == (2, 4)


def test_the_exponent_is_that_of_least_squares():
    sizes = [8, 16, 64, 512]
    assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)
    costs = [1.0, 7.0, 9.0, 300.0]
    x, y = (torch.tensor(values, dtype=torch.float64).log().tolist() for values in (sizes, costs))
    assert scaling.exponent(sizes, costs) == pytest.approx(statistics.linear_regression(x, y).slope)


def test_the_largest_jump_is_of_the_cost_of_each():
    assert scaling.largest_jump([1, 2, 4, 8], [8.0, 16.0, 96.0, 96.0]) == 3.0
    assert scaling.largest_jump([1, 4], [8.0, 16.0]) == 0.5


def test_tables_are_added_to_those_that_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path / "new")
    report.add("x", {"a": [{"ms": 1}], "b": [{"ms": 2}]}, {"code": "old"})
    report.add("x", {"b": [{"ms": 3}], "c": [{"ms": 4}]}, {"code": "new"})
    kept = json.loads((tmp_path / "new" / "x.json").read_text())
    assert kept["tables"] == {"a": [{"ms": 1}], "b": [{"ms": 3}], "c": [{"ms": 4}]}
    assert {name: how["code"] for name, how in kept["settings"].items()} == {"a": "old", "b": "new", "c": "new"}


class Holder:
    """An object in a state, as some optimizers have them."""

    def __init__(self, tensor):
        self.tensor = tensor


class Steps:
    """Makes two tensors in a step, keeps one in the place of what it had, and writes into the gradient."""

    def __init__(self, gradient):
        self.gradient = gradient
        kept = torch.zeros(100)
        self.state = {gradient: {"all": [kept, kept.view(10, 10)], "held": Holder(torch.zeros(50)), "own": gradient}}

    def step(self):
        temporary = torch.ones(1000)
        self.state[self.gradient]["all"] = [temporary[:100].clone()]
        self.gradient.add_(1)


def test_bytes_of_state_and_of_a_step():
    gradient = torch.zeros(10)
    optimizer = Steps(gradient)
    assert timing.state_bytes(optimizer) == 4 * (100 + 50 + 10)
    assert timing.state_bytes(optimizer, [gradient]) == 4 * (100 + 50)
    assert timing.extra_bytes(optimizer, [gradient]) == 4 * (1000 + 100)


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_a_forced_step_is_of_its_kind(method):
    """An ordinary step leaves factors as they are, statistics change some of them, and roots others."""
    run = Run(method, gradients_of([(96, 64), (64,)], torch.float32, CPU))

    def changed(kind):
        before = {key: value.clone() for key, value in state().items()}
        run.prepare(kind)
        run.optimizer.step()
        return {key for key, value in state().items() if not torch.equal(value, before[key])}

    def state():
        own = run.optimizer.state[run.parameters[0]]
        return {key: value for key, value in own.items() if key.startswith(("left.", "right."))}

    run.optimizer.init_state()
    run.prepare("root")
    run.optimizer.step()
    assert not changed("ordinary")
    by_kind = [changed(kind) for kind in run.method.kinds[1:]]
    assert by_kind[0]
    if len(by_kind) == 2:
        assert by_kind[1] - by_kind[0]


def test_the_floor_multiplies_every_block(monkeypatch):
    """In one piece and in several; 130 x 64 in blocks of at most 64 is 3 of 44 x 64."""
    for workspace in (methods.WORKSPACE, 1):
        monkeypatch.setattr(methods, "WORKSPACE", workspace)
        floor = Floor([torch.zeros(130, 64), torch.zeros(44, 64), torch.zeros(5)], 64)
        floor.step()
        ((gradient, result, _, left, right),) = floor.work
        assert gradient.shape == (4, 44, 64)
        run = len(left)
        assert run == (4 if workspace > 1 else 1)
        for i in range(4):
            torch.testing.assert_close(result[i], left[i % run] @ gradient[i] @ right[i % run])


def test_sets_are_of_the_size_that_their_models_have():
    sizes = {name: sum(torch.Size(shape).numel() for shape in shapes()) for name, shapes in SETS.items()}
    layer = 2048 * (2 * 2048 + 2 * 512 + 3 * 8192) + 2 * 2048  # 32 heads, 8 of keys and values, hidden 8192
    assert sizes == {
        "gpt": 6 * (12 * 384**2 + 2 * 384),
        "gpt2": 124_439_808,
        "resnet50": 25_557_032,
        "vit-s": 22_050_664,
        "llama-1b layer": layer,
        "tiny": 96 * 64 + 64 * 64 + 64,
    }


class Failing:
    """Its roots fail."""

    state: dict = {}  # noqa: RUF012

    def step(self):
        raise RuntimeError("the SVD did not converge")


def test_a_peer_that_fails_is_left_out_and_ours_is_not(capsys):
    """Nor does it cost the figures of the others; a step over the budget is timed once."""
    args = SimpleNamespace(device="cpu", rounds=3, updates=3, budget=0.0)
    gradients = gradients_of([(8, 8)], torch.float32, CPU)

    def runs(ours):
        rows = [methods.adamw(), Method("new", None, lambda parameters: Failing(), ours=ours), methods.shampoo(4, 8)]
        return {method.name: Run(method, gradients) for method in rows}

    rows = steps.measure(runs(ours=False), args)
    assert [row["optimizer"] for row in rows] == ["torch AdamW, fused", "Shampoo, 4 bits"]
    assert rows[1]["updates timed"] == 1
    assert "new is left out: its step failed: the SVD did not converge" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="SVD"):
        steps.measure(runs(ours=True), args)


def test_old_runs_keep_the_rounding_that_they_had():
    """Before version 2 every code was the nearest: those records are other methods than today's of the same bits."""
    of = {"task": "digits-mlp", "lr": 0.003, "seed": 100, "steps": 600}
    old = of | {"method": "root-2", "keywords": {"bits": 2, **convergence.ROOT}}
    renamed = convergence.in_todays_words(old)
    assert renamed["method"] == "root-2-nearest"
    run = convergence.Run("digits-mlp", "root-2-nearest", 0.003, 100, 600)
    expected = {
        name: report.plain(value) for name, value in convergence.FAMILY_OF[run.method].methods[run.method].items()
    }
    assert renamed["keywords"] == expected
    assert expected["quantization"]["rounding"] == "nearest"
    assert convergence.in_todays_words(old | {"version": 2}) == old | {"version": 2}
    for unchanged in (
        {"bits": 1, **convergence.ROOT},
        {"bits": 4, **convergence.ROOT},
        {"bits": 2, "storage": "logarithm"},
        {"bits": 32},
    ):
        assert convergence.in_todays_words(old | {"keywords": unchanged})["method"] == "root-2"


def test_every_kept_run_belongs_to_a_method():
    known = convergence.read(report.RESULTS / "convergence.jsonl")
    assert {record["method"] for record in known.values()} <= {convergence.BASELINE, *convergence.FAMILY_OF}
    plan = convergence.Plan(list(convergence.TASKS), convergence.FAMILIES["shampoo"], list(convergence.SHAMPOO))
    for task in plan.tasks:
        for method in ("root-2", "root-2-nearest", "root-1-slow", "spiked-1"):
            assert plan.result(known, task, method).sound
