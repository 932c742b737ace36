"""The command line's reference: options from its parsers, and examples that run while the site is built.

    ```{command} estimate
    ```

    ```{shell} lowbit-optim estimate vit-s --bits 2
    ```

An example runs in a folder that has nothing but `run`, a checkpoint of a small model.
"""

import argparse
import contextlib
import io
import os
import shlex
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from lowbit_optim import Shampoo, cli, save_checkpoint

PROGRAM = "lowbit-optim"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command that --help lists."""
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    return {a.dest: commands.choices[a.dest] for a in commands._choices_actions}


def options_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """What to type for each argument, and what it means."""
    for action in parser._actions:
        if action.dest != "help":
            value = action.metavar or action.dest.upper()
            takes = "" if action.nargs == 0 else f" {value}"
            typed = ", ".join(f"{flag}{takes}" for flag in action.option_strings) or str(value)
            yield typed, f"{action.help}{' (required)' if action.required and action.option_strings else ''}"


def usage(parser: argparse.ArgumentParser) -> str:
    """As --help prints it, in the width of a page."""
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=80)
    return parser.format_usage().removeprefix("usage: ").rstrip()


@cache
def output(line: str) -> tuple[int, str]:
    """The exit code and what a command line prints, to stdout and stderr."""
    program, *arguments = shlex.split(line)
    assert program == PROGRAM, line
    printed, before = io.StringIO(), Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(printed):
        os.chdir(folder)
        try:
            _save("run")
            with contextlib.redirect_stderr(printed):
                code = cli.main(arguments)
        except SystemExit as error:  # of argparse
            code = int(error.code or 0)
        finally:
            os.chdir(before)
    return code, printed.getvalue().rstrip()


def _save(folder: str) -> None:
    """A checkpoint of a small model after two steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(96, 128)
    optimizer = Shampoo(model.parameters(), lr=1e-3, bits=4, statistics_frequency=1)
    for _ in range(2):
        model(torch.randn(4, 96)).square().mean().backward()
        optimizer.step()
    save_checkpoint(folder, model=model, optimizer=optimizer, step=2)


class Command(SphinxDirective):
    """Usage, description and options of a command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        parser = parsers()[self.arguments[0]]
        lines = ["| option | what it is |", "|---|---|"]
        lines += [f"| `{typed}` | {said.replace('|', chr(92) + '|')} |" for typed, said in options_of(parser)]
        text = nodes.literal_block(usage(parser), usage(parser), language="text")
        described = self.parse_text_to_nodes(parser.description or "")
        return [*described, text, *self.parse_text_to_nodes("\n".join(lines))]


class Shell(SphinxDirective):
    """A command line and what it prints."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        line = self.arguments[0]
        code, printed = output(line)
        if code:
            logging.getLogger(__name__).warning(
                "%s ends with %d: %s", line, code, printed, location=self.get_location(), type="commands"
            )
        return [nodes.literal_block(line, line, language="sh"), nodes.literal_block(printed, printed, language="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command", Command)
    app.add_directive("shell", Shell)
    return {"parallel_read_safe": False, "parallel_write_safe": True}  # an example changes the folder it runs in
