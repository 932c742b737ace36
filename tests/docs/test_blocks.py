"""Every code block of README and site runs, or is what it says it is.

The blocks of a page share one namespace and one fresh folder, in their order, and begin with what settings.py gives
them. A block of text below a block that ran is its output, where "..." stands for anything. What nothing can check
needs a reason in exceptions.py.
"""

import doctest
import json
import re
import traceback
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from typing import Any

import pytest

from tests.docs import commands
from tests.docs.blocks import Block, blocks, pages
from tests.docs.exceptions import EXCEPTIONS
from tests.docs.settings import CHECKS, PAGES, common

PYTHON, SHELL = {"python", "py", "pycon"}, {"sh", "bash", "console", "shell"}


# What other libraries warn each other of is not the page's affair; what the library or the page itself is told, is.
@pytest.mark.filterwarnings(
    "ignore", "error:::lowbit_optim", "error:::page", "ignore:.*GradScaler is enabled, but CUDA"
)
@pytest.mark.parametrize("page", [page for page in pages() if blocks(page)])
def test_the_blocks_of(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = common(tmp_path)
    with PAGES.get(page, nullcontext)(names):
        wrong, said = [], None
        for block in blocks(page):
            excepted = EXCEPTIONS.get(block.name)
            try:
                said = check(block, names, said)
            except Exception as error:
                if not excepted:
                    wrong.append(f"{block.place}: {described(error, block)}")
            else:
                if excepted:
                    wrong.append(f"{block.place} needs no exception: {excepted}")
    assert not wrong, "\n".join(wrong)


def test_every_exception_and_check_is_of_a_block():
    there = [block for page in pages() for block in blocks(page)]
    assert EXCEPTIONS.keys() <= {block.name for block in there}
    assert CHECKS.keys() <= {line for block in there for line in block.lines}
    assert PAGES.keys() <= set(pages())


def check(block: Block, names: dict[str, Any], said: str | None) -> str | None:
    """Run a block; returns what it printed, where it ran. ``said`` is what the block above printed."""
    own = [CHECKS[line] for line in block.lines if line in CHECKS]
    for looks in own:
        looks(block.text)
    if block.language in PYTHON:
        return run_python(block, block.text, names)
    if block.language in SHELL:
        outputs = [(commands.run(line), shown) for line, shown in commands.commands(block.text)]
        for printed, shown in outputs:
            if shown:
                assert_shown(shown, printed)
        return "".join(printed or "" for printed, _ in outputs)
    if block.language == "diff":
        run_python(block, side(block.text, "-"), dict(names))
        return run_python(block, side(block.text, "+"), names)
    if block.language == "json":
        json.loads(block.text)
    elif not own:
        assert block.language in ("", "text"), f"nothing here can check {block.language!r}"
        assert_shown(block.text, said)
    return None


def side(change: str, sign: str) -> str:
    """What a diff has before or after; its lines stay where they are."""
    return "\n".join(line[1:] if line[:1] in f" {sign}" else "" for line in change.splitlines())


def run_python(block: Block, code: str, names: dict[str, Any]) -> str:
    said = StringIO()
    with redirect_stdout(said):
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, names, block.place, block.page, block.line)
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
            names.update(test.globs)
            assert not result.failed, said.getvalue()
        else:
            exec(compile(code, block.place, "exec"), names)
    return said.getvalue()


def assert_shown(shown: str, printed: str | None) -> None:
    assert printed is not None, "nothing that runs is above this text: write a check or an exception"
    pattern = r"\s+".join(re.escape(word).replace(r"\.\.\.", ".*?") for word in shown.split())
    assert re.fullmatch(rf"\s*{pattern}\s*", printed, re.DOTALL), f"it is shown to print\n{shown}and prints\n{printed}"


def described(error: Exception, block: Block) -> str:
    """An error with its line in the block."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == block.place]
    source = block.text.splitlines()
    at = f" at {source[lines[-1] - 1].strip()!r}" if lines and lines[-1] <= len(source) else ""
    return f"{type(error).__name__}{at}: {error}"
