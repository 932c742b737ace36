"""Lines of shell in the documentation: what is quick is run in this process, the rest is read by its own parser."""

import argparse
import importlib
import re
import shlex
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from setuptools.config.setupcfg import read_configuration

from lowbit_optim import cli
from tests.docs.blocks import ROOT

ASSIGNMENT = re.compile(r"[A-Z_]+=\S*")
LONG = {"demo"}  # commands of lowbit-optim that tests run elsewhere (tests/test_demo.py)


class Accepted(Exception):
    """A program's parser takes its arguments."""


def commands(text: str) -> list[tuple[str, str]]:
    """Each command with the output that is shown below it; of a text without prompts, with none."""
    lines = text.replace("\\\n", " ").splitlines()
    if not any(line.startswith("$ ") for line in lines):
        return [(line, "") for line in lines if line.strip() and not line.strip().startswith("#")]
    found: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], ""))
        else:
            command, shown = found.pop()
            found.append((command, f"{shown}{line}\n"))
    return found


def run(line: str) -> str | None:
    """Run or check one command; returns its output if it ran.

    Raises:
        AssertionError: it would not do what it is shown to do, or nothing here knows how to tell.
    """
    words = shlex.split(line, comments=True)
    while words and ASSIGNMENT.fullmatch(words[0]):
        words.pop(0)
    match words:
        case ["lowbit-optim", *arguments] | ["python", "-m", "lowbit_optim", *arguments]:
            return _library(arguments)
        case ["python", "-m", module, *arguments] if module.startswith("benchmarks."):
            return _benchmark(module, arguments)
        case ["python", script, *_] | ["torchrun", *_, script] if (ROOT / script).parent == ROOT / "examples":
            assert (ROOT / script).is_file(), f"{script} is not there"  # tests/integrations/test_examples.py runs it
        case ["make", *targets]:
            known = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
            asked = {target for target in targets if "=" not in target}
            assert asked <= known, f"the Makefile has no target {', '.join(sorted(asked - known))}"
        case ["pip", "install", *arguments] | [_, "-m", "pip", "install", *arguments]:
            _install(arguments)
        case _:
            raise AssertionError(
                f"nothing here can check {line!r}: teach tests/docs/commands.py, or write an exception"
            )
    return None


def _library(arguments: list[str]) -> str | None:
    said = StringIO()
    with redirect_stdout(said):
        try:
            if LONG & set(arguments[:1]):
                cli._parser().parse_args(arguments)
                return None
            code = cli.main(arguments)
        except SystemExit as stop:  # --help, --version, or arguments that argparse does not take
            code = stop.code
    assert not code, f"it ends with {code}"
    return said.getvalue()


def _benchmark(name: str, arguments: list[str]) -> None:
    module = importlib.import_module(name)
    if "ArgumentParser" not in Path(str(module.__file__)).read_text(encoding="utf-8"):
        assert not arguments, f"{name} takes no arguments"
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *given: object) -> None:
        parse(self, *given)  # type: ignore[arg-type]
        raise Accepted

    with patch.object(argparse.ArgumentParser, "parse_args", parse_only), patch.object(sys, "argv", [name, *arguments]):
        try:
            module.main()
        except Accepted:
            return
        except SystemExit as stop:
            raise AssertionError(f"{name} does not take {' '.join(arguments)}") from stop
    raise AssertionError(f"{name} has not read its arguments")


def _install(arguments: list[str]) -> None:
    """Packages and extras of ours exist; files that are named are there."""
    extras = set(read_configuration(ROOT / "setup.cfg")["options"]["extras_require"])
    for before, word in zip(["", *arguments], arguments, strict=False):
        if before in ("-c", "-r"):
            assert (ROOT / word).is_file(), f"{word} is not there"
        if own := re.fullmatch(r"(?:\.|lowbit-optim)\[([\w,]+)\].*", word):
            unknown = set(own[1].split(",")) - extras
            assert not unknown, f"setup.cfg has no extra {', '.join(sorted(unknown))}"
