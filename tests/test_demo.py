"""The demo: interrupted and resumed from the command line, what it reports, and what it says to wrong input."""

import contextlib
import copy
import io
import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import lowbit_optim
from lowbit_optim import cli
from lowbit_optim.checkpoint import load_checkpoint
from lowbit_optim.demo import report, worker
from lowbit_optim.demo import run as demo
from lowbit_optim.demo.worker import ADAMW, CONTEXT, RESUMED, RUNS, SHAMPOO, SHAMPOO32, Settings

TEXT = "".join(f"{i} plus {i % 7} makes {i + i % 7}\n" for i in range(150))
STEPS = 24
SETTINGS = Settings(steps=STEPS, seed=3)


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "sums.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, text_file):
    """A demo that got Ctrl-C in its first steps and then went on to its end.

    Returns:
        The folder, the output until Ctrl-C, the steps at which runs were saved then, and the output of the rest.
    """
    out = tmp_path_factory.mktemp("demo") / "the [/out]"
    command = [sys.executable, "-m", "lowbit_optim", "demo", "--steps", str(STEPS), "--seed", "3"]
    with subprocess.Popen(
        [*command, "--text", str(text_file), "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if f"step 1/{STEPS}" in line:
                process.send_signal(signal.SIGINT)
                break
        lines.append(process.communicate(timeout=100)[0])
    assert process.returncode == 130, "".join(lines)
    interrupted_at = {run: saved_step(out / run / "checkpoint") for run in RUNS}
    for run in (ADAMW, SHAMPOO32):  # in this process, which is quicker
        assert worker.train(run, Settings.load(out), out)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert cli.main(["demo", "--resume", str(out)]) == 0
    return out, "".join(lines), interrupted_at, output.getvalue()


def saved_step(folder):
    return load_checkpoint(folder)["step"] if folder.exists() else None


def results_of(out):
    return {run: json.loads((out / run / "result.json").read_text()) | {"label": run} for run in RUNS}


def test_ctrl_c_saves_and_says_how_to_go_on(finished):
    out, output, interrupted_at, _ = finished
    saved = {run: step for run, step in interrupted_at.items() if step is not None}
    assert saved
    assert all(1 <= step < STEPS for step in saved.values())
    assert f"lowbit-optim demo --resume '{out}'" in output
    assert "Traceback" not in output


def test_goes_on_from_where_it_was_interrupted_without_a_difference(finished, text_file, tmp_path):
    out, _, interrupted_at, _ = finished
    run = next(run for run, step in interrupted_at.items() if step is not None)
    (tmp_path / run).mkdir()
    assert worker.train(run, replace(SETTINGS, text=str(text_file)), tmp_path)
    whole, parts = (results_of_one(folder, run) for folder in (tmp_path, out))
    assert whole["train"] == parts["train"]
    assert whole["validation"] == parts["validation"]
    assert whole["sha256"] == parts["sha256"]


def results_of_one(out, run):
    return json.loads((out / run / "result.json").read_text())


def test_fresh_process_continues_bit_for_bit(finished):
    out, _, _, output = finished
    results = results_of(out)
    assert saved_step(out / SHAMPOO / "halfway") == STEPS // 2
    assert results[RESUMED]["train"] == results[SHAMPOO]["train"]
    assert results[RESUMED]["sha256"] == results[SHAMPOO]["sha256"]
    assert results[SHAMPOO32]["sha256"]["parameters"] != results[SHAMPOO]["sha256"]["parameters"]
    assert "BIT FOR BIT EQUAL" in output
    report = json.loads((out / "report.json").read_text())
    assert report["resumed_equals_uninterrupted"] is True
    assert report["runs"][ADAMW]["validation_loss"] == results[ADAMW]["validation_loss"]


def test_reports_what_is_on_disk(finished):
    out, _, _, output = finished
    results = results_of(out)
    for run, result in results.items():
        (file,) = (out / run / "checkpoint").glob("optimizer-*.safetensors")
        assert result["checkpoint_bytes"] == file.stat().st_size
    for run in (ADAMW, SHAMPOO32, SHAMPOO):
        assert f"{results[run]['validation_loss']:.3f}" in output
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", ["parameters", "optimizer"])
def test_a_difference_is_unmistakable(finished, tmp_path, capsys, part):
    out = shutil.copytree(finished[0], tmp_path / "out")
    file = out / RESUMED / "result.json"
    result = json.loads(file.read_text())
    result["sha256"][part] = "0" * 64
    file.write_text(json.dumps(result))
    assert cli.main(["demo", "--resume", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "NOT EQUAL" in printed
    assert "BIT FOR BIT" not in printed
    assert json.loads((out / "report.json").read_text())["resumed_equals_uninterrupted"] is False


def test_a_run_that_fails_is_named(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished[0], tmp_path / "out")
    (out / RESUMED / "result.json").unlink()
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'ValueError: out of paper' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert cli.main(["demo", "--resume", str(out)]) == 2
    error = capsys.readouterr().err
    assert f"{SETTINGS.bits:g}-bit Shampoo, resumed failed: ValueError: out of paper" in error
    assert str(out / RESUMED / "log.txt") in error


def test_resume_refuses_another_text(finished, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text(TEXT.replace("plus", "and"), encoding="utf-8")
    replace(Settings.load(finished[0]), text=str(other)).save(tmp_path)
    assert cli.main(["demo", "--resume", str(tmp_path)]) == 2
    assert f"{other} is not the text" in capsys.readouterr().err


# ---- words -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def results(finished):
    every = results_of(finished[0])
    del every[RESUMED]
    return copy.deepcopy(every)


def test_summary_is_honest_about_who_won(results):
    results[ADAMW]["validation_loss"], results[SHAMPOO]["validation_loss"] = 1.5, 1.4
    won = report.summary(results, replace(SETTINGS, steps=900))
    assert f"0.100 below {ADAMW} (1.500)" in won
    assert "does not win" not in won
    results[SHAMPOO]["validation_loss"] = 1.6
    lost = report.summary(results, SETTINGS)
    assert f"0.100 above {ADAMW} (1.500)" in lost
    assert "does not win" in lost
    assert f"{STEPS} steps are few" in lost


def test_a_run_that_diverged_is_called_so(finished, results, tmp_path, capsys):
    out = shutil.copytree(finished[0], tmp_path / "out")
    result = results[SHAMPOO] | {
        "validation_loss": math.nan,
        "validation": [(STEPS, math.nan)],
        "train": [math.nan] * STEPS,
    }
    (out / SHAMPOO / "result.json").write_text(json.dumps(result))
    cli.main(["demo", "--resume", str(out)])
    printed = capsys.readouterr().out
    assert "diverged" in printed
    assert "does not win" in printed
    assert "nan" not in printed
    assert json.loads((out / "report.json").read_text())["runs"][SHAMPOO]["validation_loss"] is None


def test_bits_32_needs_no_second_32_bit_run(results):
    labels = demo.run_labels(replace(SETTINGS, bits=32))
    assert labels == {ADAMW: "AdamW", SHAMPOO: "32-bit Shampoo", RESUMED: "32-bit Shampoo, resumed"}
    results[SHAMPOO] = results.pop(SHAMPOO32)
    assert report.table(results, replace(SETTINGS, bits=32)).columns[1:][-1].header == SHAMPOO32
    assert "torch.save" not in report.summary(results, replace(SETTINGS, bits=32))
    assert len(report.figure(results, SETTINGS).axes[1].get_xticklabels()) == 2


# ---- measuring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["root", "logarithm", "spiked", "eigen", "direct"])
def test_every_byte_of_the_state_is_counted(storage):
    model = worker.GPT(vocabulary=70)
    optimizer = worker.make_optimizer(SHAMPOO, replace(SETTINGS, storage=storage, bits=4), model.parameters())
    model(torch.zeros(2, CONTEXT + 1, dtype=torch.int64)).backward()
    optimizer.step()
    kinds = worker.state_bytes(optimizer)
    state = optimizer.state_dict()["state"]
    assert sum(kinds.values()) == sum(value.nbytes for entry in state.values() for value in entry.values())
    assert kinds["moments"] == 2 * sum(parameter.nbytes for parameter in model.parameters())
    blocks = sum(entry["left.failures"].numel() for entry in state.values() if "left.failures" in entry)
    scalars = 2 * 3 * 4 * blocks  # of each factor "rms", "updates" and "previous_norm"
    assert (kinds["statistics"] == scalars) == (storage in ("root", "logarithm"))
    assert (kinds["roots"] > 0) == (storage != "spiked")
    assert kinds["counters"] < 1000


def test_average_time_weighs_updates_by_how_often_they_are():
    ordinary = [1.0] * 9
    history = {"step_ms": [*ordinary, 11.0] * 3 + ordinary, "optimizer_ms": [0.5] * 39}
    assert worker.times(history) == {"ordinary": 1, "update": 11, "average": 2, "optimizer_average": 0.5}
    few = worker.times({"step_ms": ordinary, "optimizer_ms": ordinary})
    assert few == {"ordinary": 1, "update": None, "average": 1, "optimizer_average": 1}


def test_table_shows_a_dash_for_what_was_not_measured(results):
    for result in results.values():
        result["time_ms"]["update"] = None
    console = Console(width=100, file=io.StringIO())
    console.print(report.table(results, SETTINGS))
    (line,) = (line for line in console.file.getvalue().splitlines() if "with update" in line)
    assert line.replace("│", " ").split()[-4:] == ["median", "-", "-", "-"]


def test_sha256_sees_one_bit_and_the_names():
    tensors = {"a": torch.zeros(3), "b": torch.zeros((), dtype=torch.bfloat16)}
    changed = copy.deepcopy(tensors)
    changed["a"][1] = -0.0
    assert worker.sha256(tensors) == worker.sha256(dict(reversed(tensors.items())))
    assert worker.sha256(tensors) != worker.sha256(changed)
    assert worker.sha256(tensors) != worker.sha256({"a": tensors["a"], "c": tensors["b"]})


def test_validation_text_is_the_last_tenth_and_never_trained_on():
    corpus = worker.encode(TEXT)
    characters = sorted(set(TEXT))
    cut = len(TEXT) * 9 // 10
    assert "".join(characters[i] for i in corpus.train) == TEXT[:cut]
    windows = ["".join(characters[i] for i in window) for window in corpus.validation]
    assert TEXT[cut:].startswith("".join(window[:-1] for window in windows))
    assert len(windows) == (len(TEXT) - cut - 1) // CONTEXT
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(windows))


def test_rare_characters_become_one():
    text = "".join(chr(0x4E00 + i) * (2 if i < 255 else 1) for i in range(700))
    corpus = worker.encode(text)
    assert corpus.vocabulary == 256
    counts = Counter(corpus.train.tolist())
    assert max(counts) == 255
    assert set(range(255)) <= counts.keys()
    assert counts[255] == len(corpus.train) - 2 * 255


def test_learning_rate_warms_up_and_ends_at_zero():
    rates = [worker.schedule(100, step) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[5] == 1
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert all(0 < worker.schedule(2, step) <= 1 for step in range(2))


# ---- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--steps", "1"], ["--steps is 1", "at least 2"]),
        (["--seed", "-1"], ["--seed is -1", "from 0 to"]),
        (["--device", "abacus"], ["--device abacus", "--device cpu"]),
        (["--device", "meta"], ["--device meta", "--device cpu"]),
        (["--bits", "5"], ["bits is 5", "1.5"]),
        (["--storage", "attic"], ["'attic'", "root"]),
        (["--storage", "eigen", "--bits", "1"], ["eigen", "1"]),
        (["--text", "/no/such/file"], ["--text /no/such/file", "No such file"]),
        (["--text", "FOLDER"], ["FOLDER", "directory"]),
        (["--text", "FOLDER/binary"], ["FOLDER/binary", "UTF-8"]),
        (["--text", "FOLDER/short"], ["FOLDER/short", "5 characters", "1000"]),
        (["--out", "FOLDER/short/out"], ["--out FOLDER/short/out", "another folder"]),
        (["--resume", "FOLDER"], ["FOLDER/settings.json", "--resume"]),
        (["--resume", "FOLDER/broken"], ["FOLDER/broken/settings.json", "--resume"]),
        (["--resume", "FOLDER", "--bits", "4"], ["--resume", "leave out --bits"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_wrong_input_gets_one_line(tmp_path, monkeypatch, capsys, options, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 1000)
    (tmp_path / "short").write_text("short")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "settings.json").write_text('{"steps": 3, "bits"')
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["demo", *(option.replace("FOLDER", str(tmp_path)) for option in options)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lowbit-optim: error: ")
    assert printed.err.count("\n") == 1
    for part in named:
        assert part.replace("FOLDER", str(tmp_path)) in printed.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("module", ["rich.console", "matplotlib.axes"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("run", "report"):
        monkeypatch.delitem(sys.modules, f"lowbit_optim.demo.{name}")
        monkeypatch.delattr(lowbit_optim.demo, name)
    assert cli.main(["demo"]) == 2
    package = module.partition(".")[0]
    assert capsys.readouterr().err == (
        f'lowbit-optim: error: the demo needs {package}: pip install "lowbit-optim[demo]"\n'
    )


@pytest.mark.parametrize("arguments", [[], ["dance"], ["demo", "--steps", "many"]])
def test_unknown_arguments_show_the_usage(capsys, arguments):
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert "usage: lowbit-optim" in capsys.readouterr().err


def test_the_hidden_command_is_not_in_the_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    assert "demo" in printed
    assert "demo-run" not in printed


def test_python_comes_without_its_documentation(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert cli.main(["demo"]) == 2
    assert "--text FILE" in capsys.readouterr().err
