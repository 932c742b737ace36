"""The command line: `lowbit-optim <command>`, also `python -m lowbit_optim <command>`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit_optim import __version__
from lowbit_optim.checkpoint import CheckpointError
from lowbit_optim.conversion import ConversionError, Request
from lowbit_optim.conversion import run as run_conversion
from lowbit_optim.conversion.foreign import COORDINATES, SECOND_ORDER
from lowbit_optim.demo.worker import INTERRUPTED, RUNS, DemoError, Settings
from lowbit_optim.demo.worker import main as run_worker
from lowbit_optim.inspection import printable
from lowbit_optim.inspection import run as run_inspection
from lowbit_optim.memory import OPTIMIZERS, SHARDINGS
from lowbit_optim.planning import DTYPES, Plan, PlanError
from lowbit_optim.planning import run as run_plan
from lowbit_optim.shapes import MODELS
from lowbit_optim.storage.budget import BITS, STORAGES
from lowbit_optim.storage.small_floats import MOMENT_BITS

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
    except (CheckpointError, ConversionError) as error:  # which quote what a file says
        print(printable(f"lowbit-optim: error: {error}"), file=sys.stderr)
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
    _add_inspect(commands)
    _add_convert(commands)

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
    plan.add_argument("--sharding", help=f"{' or '.join(SHARDINGS)} (default: every process has everything)")
    plan.add_argument("--budget", help="of each process: 80GB (10^9), 80GiB (2^30) ...; says what fits")
    plan.add_argument("--figure", type=Path, metavar="FILE", help="to draw the rows into (needs matplotlib)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="to write the numbers to")


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="what a checkpoint holds: tensors, bits, bytes, and the ratio to float32",
        description="Print the tensors of a checkpoint with how they are coded, and the bytes by kind and state key "
        "beside those of the same content in float32. Headers are read, and no tensor is, unless --verify is given.",
    )
    inspect.set_defaults(command=lambda args: run_inspection(args.path, args.verify, args.json))
    inspect.add_argument("path", type=Path, metavar="PATH", help="a folder that save_checkpoint wrote")
    inspect.add_argument("--verify", action="store_true", help="check every checksum")
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="an optimizer's state at other bits, or from torch, bitsandbytes, SOAP or Shampoo, as a checkpoint",
        description="Read the state of an optimizer and write it as a checkpoint of other bits or of another storage, "
        "so that a run goes on with its factors and moments. Files of torch.save are opened with weights_only=True.",
        argument_default=argparse.SUPPRESS,
    )
    convert.set_defaults(command=_convert)
    convert.add_argument("source", type=Path, metavar="SRC", help="a checkpoint folder, or a file of torch.save")
    convert.add_argument("target", type=Path, metavar="DST", help="the folder for the new checkpoint")
    bits = ", ".join(map(str, BITS))
    convert.add_argument(
        "--bits", type=float, required=True, help=f"of factors: {bits}; of the moments of a first-order optimizer"
    )
    convert.add_argument("--storage", help=f"of factors: {', '.join(STORAGES)} (default: as it was)")
    moments = ", ".join(map(str, MOMENT_BITS))
    convert.add_argument("--base-bits", type=int, help=f"of moments beside factors: {moments} (default: as they were)")
    convert.add_argument("--optimizer", help=f"to put moments under: {', '.join(SECOND_ORDER)}; its factors start anew")
    convert.add_argument(
        "--soap-moments",
        help=f"in which coordinates exp_avg of the authors' SOAP is: {', '.join(COORDINATES)} "
        f"(default: {Request.soap_moments}, as in their present code)",
    )
    convert.add_argument(
        "--force", action="store_true", help="write into a folder that is not empty, and replace a checkpoint there"
    )


def _convert(args: argparse.Namespace) -> int:
    return run_conversion(Request(**{name: value for name, value in vars(args).items() if name != "command"}))


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
