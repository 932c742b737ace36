"""The reference pages that are made from the code say what the code does."""

import re

import pytest

import lowbit_optim
from lowbit_optim.storage.budget import STORAGES
from tests.extensions import ROOT, extension

states = extension("states")
PAGE = (ROOT / "docs/reference/state.md").read_text(encoding="utf-8")
CALLS = re.findall(r"^```\{state\} (.+)$", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def shown():
    """The names that the page shows, by call."""
    return {call: states.state_of(call) for call in CALLS}


def test_every_optimizer_and_storage_is_shown():
    classes = {call.partition("(")[0] for call in CALLS}
    same_as_another = {"CASPR": "Shampoo", "AdaBK": "KFAC"}
    wanted = {name for name in lowbit_optim.__all__ if hasattr(getattr(lowbit_optim, name), "step")}
    assert wanted - same_as_another.keys() == classes
    assert all(re.search(name, PAGE) for name in same_as_another)
    assert all(f"\n### {storage}\n" in PAGE for storage in STORAGES)
    assert all(any(f'"{storage}"' in call for call in CALLS) for storage in STORAGES if storage != "dense")


def test_every_name_has_a_meaning_and_every_meaning_a_name(shown):
    used = {name for state in shown.values() for key in state for name in states.meanings(key)}
    assert used == {*states.MATRICES, *states.PARTS, *states.OTHERS}


def test_a_name_without_a_meaning_is_named():
    with pytest.raises(KeyError, match=r"left\.phase is in no table"):
        states.meanings("left.phase")


@pytest.mark.parametrize("other", ["CASPR([weight], bits=4)", "AdaBK([weight], model=model)"])
def test_what_the_page_says_has_the_same_names(other):
    like = other.replace("CASPR", "Shampoo").replace("AdaBK", "KFAC")
    own, expected = ({k: (v.shape, v.dtype) for k, v in states.state_of(call).items()} for call in (other, like))
    assert own == expected


def test_right_has_the_names_of_left(shown):
    for state in shown.values():
        sides = ({k.partition(".")[2] for k in state if k.startswith(side)} for side in ("left.", "right."))
        left, right = sides
        assert left == right


# ---- the command line ------------------------------------------------------------------------------------------------

commands = extension("commands")
COMMANDS = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^(?:```\{shell\} )?(lowbit-optim .+)$", COMMANDS, re.MULTILINE)


def test_every_command_is_there_with_an_example():
    shown = re.findall(r"^```\{command\} (.+)$", COMMANDS, re.MULTILINE)
    assert sorted(shown) == sorted(commands.parsers())
    assert {line.split()[1] for line in EXAMPLES} == {*shown}


def test_every_option_has_a_meaning():
    options = {name: dict(commands.options_of(parser)) for name, parser in commands.parsers().items()}
    assert all(said != "None" for own in options.values() for said in own.values())
    assert options["estimate"]["--budget BUDGET"].startswith("of each process")
    assert options["convert"]["--bits BITS"].endswith("(required)")
    assert "--verify" in options["inspect"]


@pytest.mark.parametrize("line", [line for line in EXAMPLES if "demo" not in line])
def test_examples_of_the_command_line_run(line):
    code, printed = commands.output(line)
    assert code == 0, printed
    assert printed


def test_an_example_that_fails_says_so():
    code, printed = commands.output("lowbit-optim inspect nowhere")
    assert code == 2
    assert "lowbit-optim: error: nowhere" in printed
