"""What re-quantization at every update does: the state goes through a moving average of G G^T again and again.

Two tables: the error of the root after 100 updates, for each form and two values of eps; and the recovery from one
gradient that is a million times too large. (The drift over 1000 updates is in benchmarks.storage.)
"""

import argparse
import math
from dataclasses import replace
from typing import Any

import torch

from benchmarks.matrices import (
    PAPER,
    WIDTHS,
    advance,
    averages,
    bits_per_element,
    exact_root,
    fourth_root,
    log_spaced,
    low_bit,
    of_the_paper,
    relative_error,
    statistics,
)
from benchmarks.report import keep, show
from lowbit_optim.storage import Symmetric
from lowbit_optim.storage.eigen import Eigen, Rows
from lowbit_optim.storage.factors import Dense, Factor


def forms(eps: float) -> dict[str, Factor]:
    """The forms of the first table."""
    unquantized = Eigen(vectors=Rows(None), codec=Symmetric(), eps=eps, **PAPER)
    return {
        "dense: A and root, exact": Dense(eps=eps),
        "eigen: U in float32, one QR per update": unquantized,
        "eigen: U 4-bit, rectified, root 4-bit square (the paper)": of_the_paper("eigen", eps=eps),
        "direct: A and root 4-bit squares (naive)": of_the_paper("direct", eps=eps),
        **{f"root: bits={bits}": low_bit("root", bits, eps=eps) for bits in WIDTHS},
        "root: A^(-1/8), NormalFloat-4": replace(low_bit("root", 2, eps=eps), stored_power=8),
    }


def error_table(order: int, seeds: range) -> list[dict[str, Any]]:
    """Recursive error after 100 updates."""
    rows: dict[str, dict[str, Any]] = {}
    for eps in (1e-6, 1e-4):
        for label, factor in forms(eps).items():
            state = factor.init(len(seeds), order, torch.float32, "cpu")
            for m, a in averages(statistics(log_spaced(order), order // 4, seeds, 100), factor.initial_scale):
                state, mean = advance(factor, state, m), a
            size = bits_per_element(factor, order)
            row = rows.setdefault(label, {"kept between updates": label, "bits/element": size})
            error = relative_error(fourth_root(factor, state), exact_root(mean, factor)).mean().item()
            row[f"NRE, eps {eps:.0e}"] = error
    return list(rows.values())


def spike_table(order: int, seeds: range) -> list[dict[str, Any]]:
    """The 51st gradient is 1e6 times too large. The error is against an average in which it has its proper size."""
    rows = []
    forms = {"dense, no limit": Dense(statistic_limit=math.inf), "dense": Dense()}
    for label, factor in {**forms, **{f"root: bits={bits}": low_bit("root", bits) for bits in WIDTHS}}.items():
        state = factor.init(len(seeds), order, torch.float32, "cpu")
        row: dict[str, Any] = {"one gradient times 1e6": label}
        for t, (m, a) in enumerate(averages(statistics(log_spaced(order), order // 4, seeds, 56)), 1):
            spike = t == 51
            state = advance(factor, state, m, 1e6 if spike else 1.0)
            if t >= 50 and (t <= 52 or t == 56):
                root, exact = fourth_root(factor, state), exact_root(a, factor)
                # Without its scale, which grafting removes.
                root *= ((root * exact).sum((-2, -1)) / root.square().sum((-2, -1)))[:, None, None]
                when = "before" if t == 50 else "at the spike" if spike else f"{t - 51} later"
                row[f"NRE {when}"] = relative_error(root, exact).mean().item()
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--order", type=int, default=384, help="order of the first table (default 384)")
    parser.add_argument("--spike-order", type=int, default=128, help="order of the second table (default 128)")
    parser.add_argument("--seeds", type=int, default=3, help="streams per figure of the second table (default 3)")
    args = parser.parse_args()
    seeds = range(args.seeds)
    errors = error_table(args.order, range(1))
    show(f"Error of the root after 100 updates, order {args.order}, one stream", errors)
    spike = spike_table(args.spike_order, seeds)
    note = "Without a limit on tr(M) / tr(A) the spike owns the average; with it, it counts as one statistic."
    show(f"Recovery from one spike, order {args.spike_order}, mean of {args.seeds} streams", spike, note)
    keep("recursive_error", {"recursive": errors, "spike": spike}, vars(args))


if __name__ == "__main__":
    main()
