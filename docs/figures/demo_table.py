"""The table that `make demo` prints, from benchmarks/results/demo.json."""

from typing import Any

from figures import markdown

from benchmarks.figures import kept


def kilobytes(count: int) -> str:
    return f"{count / 1e3:.0f} kB"


def write() -> str:
    demo = kept("demo")
    runs = [demo["runs"][name] for name in ("adamw", "shampoo-32bit", "shampoo")]

    def row(what: str, each: Any) -> dict[str, str]:
        return {f"after {demo['settings']['steps']} steps": what} | {run["label"]: each(run) for run in runs}

    def preconditioner(run: dict[str, Any]) -> str:
        count = run["state_bytes"]["statistics"] + run["state_bytes"]["roots"]
        return f"{count / run['parameters']:.2f}" if count else "-"

    rows = [
        row("validation loss (nats per character)", lambda run: f"{run['validation_loss']:.3f}"),
        row(
            "optimizer state, bytes per parameter",
            lambda run: f"{sum(run['state_bytes'].values()) / run['parameters']:.2f}",
        ),
        row("of which the preconditioner", preconditioner),
        row("optimizer checkpoint", lambda run: kilobytes(run["checkpoint_bytes"])),
        *(
            row(what, lambda run, kind=kind: f"{run['time_ms'][kind]:.1f} ms")
            for what, kind in {
                "CPU time of an ordinary step": "ordinary",
                "of a step with statistics": "update",
                "of all steps, average": "average",
            }.items()
        ),
    ]
    place = demo["environment"]
    same = "ended with the same bits" if demo["resumed_equals_uninterrupted"] else "did NOT end with the same bits"
    return (
        f"{markdown(rows)}\nOne seed; torch {place['torch']}, Python {place['python']}, {place['cores']} CPU cores, "
        f"{demo['seconds']:.0f} seconds after the set-up. The run that was saved half way and resumed by a fresh "
        f"process {same} as the one that nothing interrupted.\n"
    )
