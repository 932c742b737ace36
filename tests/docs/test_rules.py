"""A code block that does not do what it says fails, whatever its language."""

import pytest

from tests.docs.blocks import Block
from tests.docs.test_blocks import check

WRONG = {
    "a name that is not there": ("python", "no_such_name\n", "no_such_name"),
    "a line that does not parse": ("python", "{1: 2, ...}\n", "expected"),
    "a doctest": ("python", ">>> 1 + 1\n3\n", "Expected"),
    "a keyword": ("diff", " import torch\n-torch.zeros(1)\n+torch.zeros(1, bits=2)\n", "bits"),
    "what was there before": ("diff", "-import math\n-math.no_such_function()\n+1 + 1\n", "no_such_function"),
    "a command of ours": ("sh", "lowbit-optim inspect no-such-folder\n", "ends with 2"),
    "an option of ours": ("sh", "lowbit-optim demo --no-such-option\n", "ends with 2"),
    "an output": ("console", "$ lowbit-optim --version\nlowbit-optim 99\n", "shown to print"),
    "a benchmark's option": ("sh", "python -m benchmarks.storage --no-such-option\n", "does not take"),
    "a benchmark": ("sh", "python -m benchmarks.no_such_benchmark\n", "no_such_benchmark"),
    "a target": ("sh", "make no-such-target\n", "no target"),
    "an extra": ("sh", 'pip install "lowbit-optim[nonsense]"\n', "no extra"),
    "an example": ("sh", "python examples/no_such_example.py\n", "not there"),
    "an unknown program": ("sh", "frobnicate --all\n", "nothing here can check"),
    "JSON": ("json", "{'a': 1}\n", "Expecting"),
    "text below nothing": ("text", "loss 0.5\n", "nothing that runs"),
    "an unknown language": ("cobol", "STOP RUN.\n", "nothing here can check"),
}
RIGHT = {
    "a doctest": ("python", ">>> 1 + 1\n2\n"),
    "a change": ("diff", " import math\n-x = math.sin(0)\n+x = math.cos(0)\n"),
    "an output": ("console", "$ lowbit-optim --version\nlowbit-optim ...\n"),
    "a benchmark": ("sh", "python -m benchmarks.storage --orders 64  # a small one\n"),
    "a target": ("sh", "PIP_EXTRA_INDEX_URL=https://example.org make test demo ARGS=-x\n"),
    "an extra": ("sh", "pip install -c constraints.txt -e '.[dev,docs]'\n"),
}


def block(language: str, text: str) -> Block:
    return Block("page.md", 1, language, text)


@pytest.mark.parametrize(("language", "text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_fails(language, text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of whatever kind, it fails the page
        check(block(language, text), {}, None)
    assert message in f"{caught.value}{capsys.readouterr()}"


@pytest.mark.parametrize(("language", "text"), RIGHT.values(), ids=RIGHT)
def test_what_is_right_passes(language, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(block(language, text), {}, None)


def test_text_below_a_block_is_its_output():
    names: dict[str, object] = {}
    said = check(block("python", "print('loss', 0.25)\nprint('after', 3, 'steps')\n"), names, None)
    check(block("text", "loss ...\nafter 3 steps\n"), names, said)
    with pytest.raises(AssertionError, match="shown to print"):
        check(block("text", "loss ...\nafter 4 steps\n"), names, said)
