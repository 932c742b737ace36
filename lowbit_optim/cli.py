"""The command line: `lowbit-optim <command>`, also `python -m lowbit_optim <command>`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit_optim import __version__
from lowbit_optim.demo.worker import INTERRUPTED, RUNS, DemoError, Settings
from lowbit_optim.demo.worker import main as run_worker
from lowbit_optim.memory import OPTIMIZERS, SHARDINGS
from lowbit_optim.planning import DTYPES, Plan, PlanError
from lowbit_optim.planning import run as run_plan
from lowbit_optim.shapes import MODELS
from lowbit_optim.storage.budget import BITS, STORAGES

DEMO_OUT = Path("lowbit-optim-demo")
DEMO_EXTRA = {"rich", "matplotlib"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of `argv` (default: the command line) and return the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.command(args)
    except (DemoError, PlanError) as error:
        print(f"lowbit-optim: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lowbit-optim", description="Second-order optimizers with low-bit state.")
    parser.add_argument("--version", action="version", version=f"lowbit-optim {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)

    demo = commands.add_parser(
        "demo",
        help="train a small transformer with AdamW and with low-bit Shampoo, and compare",
        description="Train a small transformer with AdamW and with Shampoo on 32-bit and on low-bit state, resume from "
        "a compressed checkpoint in a fresh process, and end with a table, a picture and all numbers as JSON.",
        argument_default=argparse.SUPPRESS,
    )
    demo.set_defaults(command=_demo)
    demo.add_argument("--steps", type=int, help=f"of each run (default: {Settings.steps})")
    demo.add_argument("--seed", type=int, help=f"of first weights and batches (default: {Settings.seed})")
    demo.add_argument("--device", help=f"any that torch has: cpu, cuda, cuda:1, mps ... (default: {Settings.device})")
    demo.add_argument("--storage", help=f"of Shampoo's factors: {', '.join(STORAGES)} (default: {Settings.storage})")
    bits = ", ".join(map(str, BITS))
    demo.add_argument("--bits", type=float, help=f"per element of a factor: {bits} (default: {Settings.bits})")
    demo.add_argument("--text", metavar="FILE", help="to train on (default: the documentation that comes with Python)")
    demo.add_argument("--out", type=Path, metavar="DIR", help=f"for everything written (default: {DEMO_OUT})")
    demo.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted demo: its --out, alone")

    _add_estimate(commands)

    worker = commands.add_parser("demo-run")  # one training run of the demo; without help it is not listed
    worker.set_defaults(command=lambda args: run_worker(args.out, args.run))
    worker.add_argument("out", type=Path)
    worker.add_argument("run", choices=RUNS)
    return parser


def _add_estimate(commands: Any) -> None:
    plan = commands.add_parser(
        "estimate",
        help="what a model's training will take with one optimizer and another, without allocating anything",
        description="Print the bytes of parameters, gradients, optimizer state and the worst step's workspace of a "
        "model, with AdamW of 32 and 8 bits, with 32-bit Shampoo and with a low-bit optimizer.",
        argument_default=argparse.SUPPRESS,
    )
    plan.set_defaults(command=_estimate)
    plan.add_argument(
        "spec",
        metavar="SPEC",
        help=f"{', '.join(MODELS)}; module:function, which returns a module, shapes, or names and shapes; or a folder "
        "or JSON file with a configuration of Hugging Face, or the name of one in its cache (needs transformers)",
    )
    default = Plan("")
    plan.add_argument("--optimizer", help=f"{', '.join(OPTIMIZERS)} (default: {default.optimizer})")
    plan.add_argument("--bits", type=float, help="of the optimizer (default: a row for each of 4, 2 and 1)")
    plan.add_argument("--base-bits", type=int, help=f"of its moments: 32, 8 or 4 (default: {default.base_bits})")
    plan.add_argument("--dtype", help=f"of parameters and gradients: {', '.join(DTYPES)} (default: {default.dtype})")
    plan.add_argument("--world-size", type=int, help="processes (default: 1)")
    plan.add_argument("--sharding", help=f"a plan: {', '.join(SHARDINGS)} (default: every process has everything)")
    plan.add_argument("--budget", help="of each process: 80GB (10^9), 80GiB (2^30) ...; says what fits")
    plan.add_argument("--figure", type=Path, metavar="FILE", help="to draw the rows into (needs matplotlib)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="to write the numbers to")


def _estimate(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if name != "command"}
    figure, numbers = given.pop("figure", None), given.pop("json", None)
    return run_plan(Plan(**given), figure, numbers)


def _demo(args: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(args).items() if name != "command"}
    resume = given.pop("resume", None)
    if resume is not None and given:
        options = ", ".join(f"--{name}" for name in given)
        raise DemoError(f"--resume goes on with the settings in {resume}: leave out {options}")
    try:
        from lowbit_optim.demo import run as demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in DEMO_EXTRA:
            raise
        raise DemoError(f'the demo needs {package}: pip install "lowbit-optim[demo]"') from error
    if resume is not None:
        return demo.resume(resume)
    return demo.start(given.pop("out", DEMO_OUT), Settings(**given))
