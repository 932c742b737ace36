"""Ideas for fewer bits at less error that are not in the library: what each does to the root form.

Every idea changes one thing about a root form of 4- or 2-bit codes (bits=2 and bits=1). Codes are not packed here: a
matrix is rounded and kept as numbers, with exact scales, which makes an idea a few lines. Where it takes more bits than
the form that it is compared with, its row says so. The error is that of benchmarks.storage, after 150
updates at order 128.
"""

import argparse
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.matrices import SPECTRA
from benchmarks.report import keep, show
from benchmarks.storage import recursive_error, streams
from lowbit_optim.kernels.reference import FIT_CANDIDATES
from lowbit_optim.linalg import eigh, matrix_power, symmetrize
from lowbit_optim.storage.blockwise import Parts
from lowbit_optim.storage.codebooks import codebook
from lowbit_optim.storage.factors import State, put, take
from lowbit_optim.storage.root import Root
from lowbit_optim.storage.symmetric import Symmetric, lower

BLOCK = 64


@lru_cache
def incoherence(order: int) -> Tensor:
    """A Hadamard matrix times random signs, orthogonal [n, n]; n is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < order:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    signs = torch.randint(2, (order,), generator=torch.Generator().manual_seed(1)) * 2 - 1
    return h * signs


@dataclass(frozen=True)
class Trial(Symmetric):
    """A symmetric matrix whose triangle is rounded in blocks, and kept as the numbers that its codes stand for.

    Args:
        bits: of a code.
        tables: names of code tables; each block takes the one of least squared error, with the scale that suits it. A
            name with a minus in front is the table's mirror image.
        hadamard: round H X H^T in the place of X.
        stochastic: round to one of the two nearest values, with probabilities that make the mean exact.
        fitted: choose scales by least squared error, else the largest magnitude.
    """

    bits: int = 4
    tables: tuple[str, ...] = ("nf",)
    hadamard: bool = False
    stochastic: bool = False
    fitted: bool = True

    def encode(self, x: Tensor) -> Parts:
        if self.hadamard:
            h = incoherence(x.shape[-1]).to(x.dtype)
            x = symmetrize(h @ x @ h.mT)
        values = self.rounded(x.flatten(-2)[:, lower(x.shape[-1], x.device)])
        return {"diagonal": x.diagonal(dim1=-2, dim2=-1).clone(), "values": values}

    def decode(self, parts: Parts, dtype: torch.dtype = torch.float32) -> Tensor:
        x = super().decode(parts, dtype)
        if self.hadamard:
            h = incoherence(x.shape[-1]).to(dtype)
            x = symmetrize(h.mT @ x @ h)
        return x

    def rounded(self, x: Tensor) -> Tensor:
        """Rows [k, n] as their codes would give them back."""
        blocks = pad(x, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
        largest = blocks.abs().amax(-1, keepdim=True)
        best, least = torch.zeros_like(blocks), torch.full_like(largest, torch.inf)
        for name in self.tables:
            table = codebook(name.removeprefix("-"), self.bits).unique().to(x.dtype)
            table = -table.flip(0) if name.startswith("-") else table
            for fraction in FIT_CANDIDATES if self.fitted else (1.0,):
                scale = torch.where(largest > 0, largest * fraction, 1.0)
                got = table[torch.bucketize(blocks / scale, (table[1:] + table[:-1]) / 2)] * scale
                error = (got - blocks).square().sum(-1, keepdim=True)
                if self.stochastic:
                    got = self.at_random(blocks / scale, table) * scale
                best, least = torch.where(error < least, got, best), least.minimum(error)
        return best.flatten(-2)[..., : x.shape[-1]]

    def at_random(self, x: Tensor, table: Tensor) -> Tensor:
        above = torch.bucketize(x, table).clamp(1, len(table) - 1)
        low, high = table[above - 1], table[above]
        return torch.where(torch.rand_like(x) < (x - low) / (high - low), high, low)


class Study(Root):
    """The root form with something else done when X is read for an update and when the new one is written."""

    def read(self, state: State) -> Tensor:
        return self.codec.decode(take("root", state))

    def write(self, x: Tensor, state: State) -> State:
        raise NotImplementedError

    def _update(self, state: State, m: Tensor, magnitude: Tensor, damping: Tensor | None) -> tuple[State, Tensor]:
        exact = Root(codec=Symmetric(), eps=self.eps)
        changed, ok = exact._update(state | put("root", exact.codec.encode(self.read(state))), m, magnitude, damping)
        return changed | self.write(exact.codec.decode(take("root", changed)), state), ok


@dataclass(frozen=True, kw_only=True)
class Feedback(Study):
    """The error of each rounding is added before the next, so that errors cancel over time.

    Args:
        residual: how the error is kept.
    """

    residual: Symmetric

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        zero = self.residual.encode(torch.zeros(blocks, order, order, dtype=dtype, device=device))
        return super().init(blocks, order, dtype, device) | put("error", zero)

    def write(self, x: Tensor, state: State) -> State:
        x = x + self.residual.decode(take("error", state))
        parts = self.codec.encode(x)
        return put("root", parts) | put("error", self.residual.encode(x - self.codec.decode(parts)))


@dataclass(frozen=True, kw_only=True)
class Corrected(Study):
    """Eigenvalues are corrected for the rounding error, whose variance s^2 is kept as one number more.

    A symmetric error moves eigenvalue l_i by about s^2 sum_j 1 / (l_i - l_j): it pushes them apart, and the smallest of
    X, which is the largest of A, down. The sum is smoothed at 0.3 of the error's norm.
    """

    def init(self, blocks: int, order: int, dtype: torch.dtype, device: torch.device | str) -> State:
        return super().init(blocks, order, dtype, device) | {"variance": torch.zeros(blocks, device=device)}

    def read(self, state: State) -> Tensor:
        values, vectors, _ = eigh(super().read(state))
        variance = state["variance"][:, None]
        gaps = values.unsqueeze(-1) - values.unsqueeze(-2)
        width = 0.09 * values.shape[-1] * variance.unsqueeze(-1) + torch.finfo(values.dtype).tiny
        shift = variance * (gaps / (gaps.square() + width)).sum(-1)
        return matrix_power(values - shift, vectors, 1.0)

    def write(self, x: Tensor, state: State) -> State:
        parts = self.codec.encode(x)
        n = x.shape[-1]
        error = self.codec.decode(parts) - x
        return put("root", parts) | {"variance": error.square().sum((-2, -1)) / (n * (n - 1))}


def forms() -> dict[str, Root]:
    """What is compared, by the name of its row."""
    rows: dict[str, Root] = {}
    for bits in (4, 2):
        rows |= {
            f"{bits}-bit codes, as in the library but for exact scales": Root(codec=Trial(bits=bits)),
            f"{bits}-bit, scales not fitted": Root(codec=Trial(bits=bits, fitted=False)),
            f"{bits}-bit, Lloyd-Max (no zero)": Root(codec=Trial(bits=bits, tables=("lloyd-max",))),
            f"{bits}-bit, Hadamard and signs": Root(codec=Trial(bits=bits, hadamard=True)),
            f"{bits}-bit, the table or its mirror image": Root(codec=Trial(bits=bits, tables=("nf", "-nf"))),
            f"{bits}-bit, the table or Lloyd-Max": Root(codec=Trial(bits=bits, tables=("nf", "lloyd-max"))),
            f"{bits}-bit, stochastic rounding": Root(codec=Trial(bits=bits, stochastic=True)),
            f"{bits}-bit, stochastic, not fitted": Root(codec=Trial(bits=bits, stochastic=True, fitted=False)),
            f"{bits}-bit, feedback, exact error": Feedback(codec=Trial(bits=bits), residual=Symmetric()),
            f"{bits}-bit, eigenvalues corrected": Corrected(codec=Trial(bits=bits)),
        }
        rows[f"{bits}-bit, feedback, {bits}-bit error: twice the bits"] = Feedback(
            codec=Trial(bits=bits), residual=Trial(bits=bits)
        )
    rows["8-bit codes, as in the library but for exact scales"] = Root(
        codec=Trial(bits=8, tables=("linear",), fitted=False)
    )
    return rows


def measure(order: int, seeds: range, updates: int) -> list[dict[str, Any]]:
    """One row an idea."""
    rows = []
    for label, factor in track(forms().items(), "ideas", transient=True):
        row: dict[str, Any] = {"root form": label}
        for name, stream in streams(order, seeds, updates, list(SPECTRA)).items():
            torch.manual_seed(0)  # of stochastic rounding
            row[name], _, _ = recursive_error(factor, stream, seeds, order)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=128, help="a power of two (default 128)")
    parser.add_argument("--updates", type=int, default=150, help="updates of each stream (default 150)")
    parser.add_argument("--seeds", type=int, default=2, help="streams per figure (default 2)")
    args = parser.parse_args()
    rows = measure(args.order, range(args.seeds), args.updates)
    title = f"Error of A^(-1/4) at order {args.order}, {args.updates} updates, mean of {args.seeds} streams"
    show(title, rows)
    keep("storage_ideas", {"ideas": rows}, vars(args))


if __name__ == "__main__":
    main()
