"""What Shampoo would take on 64 to 4096 GPUs: memory, bytes on the network, the time of a step, and what limits it.

    python -m benchmarks.scale_plan
    python -m benchmarks.scale_plan --matmul-tflops 40 --memory-gbs 3000

A plan, not a measurement: what every rank has, holds and sends is worked out by the library's own placement (see
``benchmarks.spread``, which tests hold equal to what processes send); times come from costs and a model of the network.

Costs. By default they are measured here, on one thread of the CPU: steps of Shampoo on blocks of several sizes, and of
AdamW. A block of r x c then takes a sum of powers of r and c that is fitted to them. With ``--matmul-tflops`` and
``--memory-gbs`` they are ASSUMED: what the library multiplies (that of an update on a GPU is counted: about 46 products
for a factor), at that rate in float32; and memory that is read and written, at that rate: 10 times a float32 for each
number of a block, twice for each number that is copied to be sent or back, for each number of its roots the codes and
twice a float32, in an update three times a float32 for each product, in the base's step parameters and moments twice
and gradients once. What the host takes (Python) is always measured here: for each round, for each piece that is copied,
and for each matrix and rank. It comes on top of all other work.

Network. A node has g GPUs; each sends I bytes a second to others in its node and E to other nodes; L is a latency, M
what a message costs. On R ranks, of which each has s bytes for all others, or sends and receives at most s:

* all-gather: L log2(R) + (R - 1) s / min(I, g E), for the rings of g GPUs share the links of a node; on one node / I.
* all-reduce of S bytes: twice an all-gather of s = S / R.
* all-to-all: L + M (messages) + s max(x / E, (1 - x) / I), where x = max(R - g, 0) / (R - 1) of it goes to other nodes.

Steps. Rounds follow each other as in the library: while one is worked on, the next one's gradients come and the last
one's results go; what is told of blocks, and that settings agree, is waited for. The slowest rank counts in every
round; "busy" is how much of its time the mean rank works on blocks, without an update. A step is the mean over a
period, with its update once in ``--period`` steps. The training's own bytes are those of DDP (gradients all-reduced) or
FSDP2 (parameters gathered twice, gradients reduced; with HSDP reduced between copies of the model, too), which AdamW
has as well.

Memory is that of the rank that has most: parameters and gradients in ``--dtype``; AdamW's moments at ``--base-bits``;
factors at ``--bits``; buffers of the exchange; the keyword ``workspace``. Embeddings and heads are left to the base, as
``param_groups`` does. HSDP has a copy of the model on the fewest GPUs, from one node on, where it fits.

The limit is "memory" where it does not fit; else what takes most of a step: "network" (as far as it is waited for),
"update", "host", or "ordinary", all other work, the base's among it.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import ceil, log2
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported

import numpy as np
import torch

from benchmarks import costs, methods, report, spread, timing
from benchmarks.costs import Costs
from benchmarks.spread import Shape, Spread
from lowbit_optim.shapes import MODELS

Rows = list[dict[str, Any]]
PLANNED = ("llama2-7b", "llama3-70b", "llama3-405b")
MODES = {"DDP": "ddp", "FSDP2 whole": "whole", "FSDP2 local": "local", "HSDP whole": "whole"}
AGREED = 56  # bytes that tell whether ranks agree on settings
LEFT_TO_BASE = ("embed_tokens.weight", "lm_head.weight")


# ---- the network -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """GPUs in a node; bytes a second of each in its node and to others; seconds of a latency and of a message."""

    node: int
    inside: float
    between: float
    latency: float
    message: float

    def all_gather(self, ranks: int, each: Any) -> Any:
        """Seconds; ``each`` is in bytes of a rank."""
        rate = self.inside if ranks <= self.node else min(self.inside, self.node * self.between)
        return self.latency * ceil(log2(ranks)) + (ranks - 1) * each / rate

    def all_reduce(self, ranks: int, size: float) -> float:
        """Seconds; ``size`` is in bytes, of the whole."""
        return float(2 * self.all_gather(ranks, size / ranks))

    def all_to_all(self, ranks: int, most: Any, messages: Any) -> Any:
        """Seconds; ``most`` is in bytes that a rank sends or receives."""
        out = max(ranks - self.node, 0) / (ranks - 1)
        each = max(out / self.between, (1 - out) / self.inside)
        return self.latency + self.message * messages + most * each


# ---- a step ----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """Seconds of a step on the slowest ranks."""

    ordinary: float  # work on numbers without an update
    host: float  # beyond that
    update: float  # beyond both
    network: float  # all of it, waited for or not
    whole: float  # an ordinary step, with what is waited for
    worst: float  # a step with updates
    busy: float  # how much of the slowest ranks' time in rounds the mean rank works on blocks

    def mean(self, period: int) -> float:
        return self.whole + (self.worst - self.whole) / period


def step(own: Spread, numbers: int, of: Costs, network: Network) -> Step:
    """What a step takes.

    Args:
        own: over the ranks that share the work.
        numbers: that the base steps on, on a rank.
    """
    ranks = own.ranks
    blocks, update = own.summed(of.of_ordinary), own.summed(of.of_update)
    numbers_only = blocks + of.copied * own.copied
    ordinary = numbers_only + of.host.each_piece * own.pieces + of.host.each_round
    told = network.all_gather(ranks, own.told[:, 0])
    coming = going = np.zeros(len(own.rounds))
    if own.mode == "ddp":
        going = network.all_gather(ranks, own.gathered[:, 0])
    elif own.mode == "whole":
        coming = going = network.all_to_all(ranks, np.maximum(*own.collected).max(1), own.messages.max(1))
    meanwhile = np.append(coming[1:], 0) + np.append(0, going[:-1])
    agreed = network.all_gather(ranks, AGREED) + network.all_reduce(ranks, 4 * own.alone)
    base, owners = of.base * numbers, of.host.each_owner * ranks * sum(map(len, own.rounds))

    def waited(work: Any) -> float:
        return float(agreed + coming[0] + np.maximum(work.max(1) + told, meanwhile).sum() + going[-1] + base + owners)

    slowest, of_numbers = ordinary.max(1).sum(), numbers_only.max(1).sum()
    return Step(
        ordinary=float(of_numbers + base),
        host=float(slowest - of_numbers + owners),
        update=float((ordinary + update).max(1).sum() - slowest),
        network=float(agreed + (coming + going + told).sum()),
        whole=waited(ordinary),
        worst=waited(ordinary + update),
        busy=float(blocks.mean(1).sum() / slowest),
    )


# ---- a plan ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """One mode on so many GPUs, of which each ``shards`` have one copy of the model: all of them under FSDP2."""

    shapes: dict[str, Shape]
    mode: str
    gpus: int
    shards: int
    spread: Spread
    memory: dict[str, float]  # GB, of the rank that has most

    @property
    def total(self) -> float:
        return sum(self.memory.values())

    @property
    def numbers(self) -> int:
        """Parameters on a rank."""
        return spread.numbers_on_first(self.shapes.values(), 1 if self.mode == "DDP" else self.shards)

    def own_gb(self, itemsize: int) -> float:
        """What training sends itself from each rank."""
        copies = self.gpus if self.mode == "DDP" else self.gpus // self.shards
        between = 2 * (copies - 1) / copies * self.numbers
        gathered = 0 if self.mode == "DDP" else 3 * (self.shards - 1) * self.numbers
        return (between + gathered) * itemsize / 1e9


def plan(shapes: dict[str, Shape], mode: str, gpus: int, shards: int, args: argparse.Namespace) -> Plan:
    """A mode with copies of the model on so many GPUs."""
    own = [shape for name, shape in shapes.items() if name not in LEFT_TO_BASE]
    settings = {"limit": args.limit, "workspace": args.workspace, "sent_as": 2 if args.exchange_dtype else 4}
    of_model = Spread(own, MODES[mode], shards, left=len(shapes) - len(own), **settings)
    cut = 1 if mode == "DDP" else shards
    dtype = getattr(torch, args.dtype)
    numbers = spread.numbers_on_first(shapes.values(), cut) * dtype.itemsize
    factors = of_model.summed(spread.factor_bytes(args.bits)).sum(0)
    memory = {
        "parameters": numbers,
        "gradients": numbers,
        "moments": spread.moment_bytes(list(shapes.values()), args.base_bits, dtype, cut),
        "factors": factors.max(),
        "buffers": of_model.buffers,
        "workspace": args.workspace,
    }
    return Plan(shapes, mode, gpus, shards, of_model, {name: float(size) / 1e9 for name, size in memory.items()})


def plans(shapes: dict[str, Shape], args: argparse.Namespace) -> Iterator[Plan]:
    """Every mode on every number of GPUs."""
    room = args.gpu_gb - args.others_gb
    for gpus in args.gpus:
        for mode in MODES:
            shards = args.node if mode.startswith("HSDP") else gpus
            found = plan(shapes, mode, gpus, shards, args)
            while found.total > room and found.shards < gpus:
                found = plan(shapes, mode, gpus, 2 * found.shards, args)
            yield found


def rows_of(found: Plan, of: Costs, network: Network, args: argparse.Namespace) -> tuple[dict[str, Any], ...]:
    """Rows of the tables of memory and of steps."""
    own, room = found.spread, args.gpu_gb - args.others_gb
    first: dict[str, Any] = {"mode": found.mode, "GPUs": found.gpus, "shards": found.shards}
    factors = own.summed(spread.factor_bytes(args.bits))
    memory = first | found.memory | {"all GB": found.total, "fits": "yes" if found.total <= room else "no"}
    memory["factors, worst / mean"] = balance(factors)
    taken = step(own, found.numbers, of, network)
    mean = taken.mean(args.period)
    parts = {"ordinary": taken.ordinary, "host": taken.host, "update": taken.update / args.period}
    parts["network"] = mean - sum(parts.values())
    limit = max(parts, key=lambda part: parts[part]) if found.total <= room else "memory"
    steps = first | {
        "blocks": own.blocks.sum() / own.ranks,
        "worst / mean": balance(own.summed(lambda r, c: r**3 + c**3)),
        "rounds": len(own.rounds),
        "busy": taken.busy,
        "sent GB": float(own.sent.max()) / 1e9,
        "training's GB": found.own_gb(getattr(torch, args.dtype).itemsize),
        "ordinary s": taken.ordinary,
        "host s": taken.host,
        f"update s / {args.period}": taken.update / args.period,
        "network s": taken.network,
        "step s": mean,
        "worst s": taken.worst,
        "limit": limit,
    }
    return memory, steps


def balance(loads: Any) -> float:
    """The load of the worst rank over the mean, from [rounds, ranks]."""
    total = loads.sum(0)
    return float(total.max() / total.mean()) if total.any() else 1.0


def placements(args: argparse.Namespace) -> Rows:
    """Of all matrices of every model that is known, on numbers of ranks that have at least 20 blocks each."""
    rows: Rows = []
    for model, shapes in MODELS.items():
        for ranks in sorted({2, 4, 8, 16, *args.gpus}):
            own = Spread(shapes().values(), "ddp", ranks, limit=args.limit)
            blocks = int(own.blocks.sum())
            if blocks >= 20 * ranks:
                factors = own.summed(spread.factor_bytes(args.bits))
                row = {"model": model, "ranks": ranks, "blocks": blocks, "blocks / ranks": blocks / ranks}
                row |= {"worst / mean, cost": balance(own.summed(lambda r, c: r**3 + c**3))}
                row |= {"worst / mean, bytes": balance(factors)}
                rows.append(row | {"worst / all, bytes": float(factors.sum(0).max() / factors.sum())})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", default=list(PLANNED), choices=list(MODELS), help=f"(default {' '.join(PLANNED)})")
    add("--gpus", nargs="+", type=int, default=[64, 256, 1024, 4096], help="(default 64 256 1024 4096)")
    add("--bits", type=float, default=2, help="of factors (default 2)")
    add("--base-bits", type=int, default=4, help="of moments (default 4)")
    add("--limit", type=int, default=1200, help="max_preconditioner_dim (default 1200)")
    add("--period", type=int, default=100, help="statistics_frequency (default 100)")
    add("--workspace", type=int, default=2**28, help="bytes, the keyword (default 256 MiB)")
    add("--exchange-dtype", choices=["bfloat16"], help="the keyword (default none: float32)")
    add("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of parameters (default bfloat16)")
    add("--gpu-gb", type=float, default=80.0, help="memory of a GPU (default 80)")
    add("--others-gb", type=float, default=20.0, help="of it for activations and gathered layers (default 20)")
    add("--matmul-tflops", type=float, help="assumed, float32; with --memory-gbs (default: costs are measured here)")
    add("--memory-gbs", type=float, help="assumed, of a GPU's memory")
    add("--node", type=int, default=8, help="GPUs of a node, assumed (default 8)")
    add("--inside-gbs", type=float, default=400.0, help="of a GPU to others of its node, assumed (default 400)")
    add("--between-gbs", type=float, default=50.0, help="of a GPU to other nodes, assumed (default 50)")
    add("--latency-us", type=float, default=10.0, help="of a hop, assumed (default 10)")
    add("--message-us", type=float, default=1.0, help="of a message of an all-to-all, assumed (default 1)")
    add("--rounds", type=int, default=7, help="timed steps of each size (default 7)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (args.matmul_tflops is None) != (args.memory_gbs is None):
        parser.error("--matmul-tflops and --memory-gbs go together")
    if args.matmul_tflops is None:
        of, tried = costs.measured(args.bits, args.base_bits, args.rounds)
    else:
        itemsize = getattr(torch, args.dtype).itemsize
        rates = args.matmul_tflops * 1e12, args.memory_gbs * 1e9
        of, tried = costs.assumed(args.bits, args.base_bits, itemsize, *rates, args.rounds)
    network = Network(
        args.node, args.inside_gbs * 1e9, args.between_gbs * 1e9, args.latency_us / 1e6, args.message_us / 1e6
    )
    suffix = ", assumed GPU" if args.matmul_tflops else ""
    tables: dict[str, Rows] = {f"costs{suffix}": tried, "placements": placements(args)}
    report.show(f"Costs of a block. {of.source}", tried)
    report.show("Placements of all matrices, embeddings too", tables["placements"])
    note = f"Costs {of.source}. Network ASSUMED: nodes of {args.node}, {args.inside_gbs:g} GB/s in a node, "
    note += f"{args.between_gbs:g} between, {args.latency_us:g} us a hop, {args.message_us:g} us a message."
    for model in args.models:
        pairs = [rows_of(found, of, network, args) for found in plans(MODELS[model](), args)]
        tables[f"memory, {model}"], tables[f"steps, {model}{suffix}"] = map(list, zip(*pairs, strict=True))
        report.show(f"{model}: GB of the rank that has most", tables[f"memory, {model}"])
        report.show(f"{model}: steps", tables[f"steps, {model}{suffix}"], note)
    code = report.code_hash(__file__, costs.__file__, spread.__file__, methods.__file__, timing.__file__)
    how = {"environment": report.environment(), "code": code, "costs": asdict(of), "network": asdict(network)}
    report.add("scale_plan", tables, how | vars(args))


if __name__ == "__main__":
    main()
