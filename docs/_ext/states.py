"""Tables of state-dict names, from optimizers that are made and step while the site is built.

    ```{state} Shampoo([weight], storage="eigen", bits=4)
    :keys: left.
    ```

What is written here by hand is only what a name means; a name without a meaning, or a meaning without a name, fails the
build and tests/test_reference.py.
"""

import re
from typing import Any

import torch
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import lowbit_optim

ROWS, COLUMNS = 128, 96

# What follows "left." or "right.", or "base." of a moment: first the matrix or moment, then the part of it.
MATRICES = {
    "statistic": "the statistic A",
    "root": "the inverse root A^(-1/p); storage `root`: of A / rms², and at p = 1 and 2 its power A^(-1/4)",
    "logarithm": "-log(A / rms²)",
    "cholesky": "the lower triangle C with C Cᵀ = A",
    "error": "what rounding C has lost, to be given back",
    "eigenvectors": "the eigenvectors of A; storage `reflector`: their Householder reflectors; storage `spiked`: "
    "those that are kept, all in one row",
    "basis": "the eigenbasis that gradients are turned into; basis `reflector`: its Householder reflectors",
    "exp_avg": "the first moment",
    "exp_avg_sq": "the second moment",
    "momentum_buffer": "the momentum",
    "sum": "the sum of squares",
}
PARTS = {
    "codes": "packed codes: each row of m numbers as ceil(m bits / 8) bytes",
    "scales": "one scale for each block of a row; uint8: in 255ths of scale_maxima",
    "scale_maxima": "float32 for each 256 scales of a row",
    "diagonal": "the diagonal, exact",
    "values": "the numbers themselves, rounded to this dtype",
}
OTHERS = {
    "step": "steps of the parameter with a gradient; on the CPU",
    "base.step": "steps of the base; on the CPU unless it is fused or capturable",
    "nonfinite": "gradient blocks (of a first-order optimizer: numbers) that were not finite and counted as zero",
    "base.nonfinite": "numbers of gradients that the base counted as zero",
    "rms": "the root of tr(A) / n, the scale of the factor",
    "ridge": "the damping that is in the root, which is taken off when A is read",
    "eigenvalues": "the eigenvalues of A, in the order of the eigenvectors",
    "rest": "the one number in the place of all other eigenvalues, for storage `spiked`",
    "updates": "statistics since the first that was not zero; of `moment`: gradients",
    "previous_norm": "(tr M)^(1/2) of the last statistic M",
    "failures": "updates and roots that failed, for which the last good one was kept",
    "turns": "times that the basis has followed the statistic",
    "moment.rms": "the root of the average of squares in the eigenbases",
}

State = dict[str, torch.Tensor]


def state_of(call: str) -> State:
    """The state of a parameter of 128 x 96 after two steps of the optimizer that the call makes."""
    torch.manual_seed(0)
    model = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    optimizer = eval(call, {**vars(lowbit_optim), "torch": torch, "weight": model.weight, "model": model})
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, COLUMNS)).square().sum().backward()
        optimizer.step()
    return dict(optimizer.state_dict()["state"].get(0, {}))


def meanings(key: str) -> list[str]:
    """The names in the tables above that say what a key means, most special first; KeyError if nothing does."""
    if key in OTHERS:
        return [key]
    name = re.sub(r"^(left|right|base|moment)\.", "", key)
    matrix, _, part = name.partition(".")
    if matrix in MATRICES and (not part or part in PARTS):
        return [matrix, *([part] if part else [])]
    if name in OTHERS:
        return [name]
    raise KeyError(f"{key} is in no table of docs/_ext/states.py: say there what it means")


def meaning(key: str, said: set[str]) -> str:
    """What a key means; the matrix that it is a part of, once for all of its parts, which ``said`` remembers."""
    names = meanings(key)
    side = key.removesuffix(names[-1])
    told = {**MATRICES, **PARTS, **OTHERS}
    new = [name for name in names if name in PARTS or f"{side}{name}" not in said]
    said |= {f"{side}{name}" for name in names}
    return ": ".join(told[name] for name in new)


class StateTable(SphinxDirective):
    """Name, dtype, shape and meaning of every tensor in a parameter's state."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec = {"keys": directives.unchanged}  # noqa: RUF012 (as docutils has it)

    def run(self) -> list[nodes.Node]:
        call, start = self.arguments[0], self.options.get("keys", "")
        lines = ["| name | dtype | shape | what it is |", "|---|---|---|---|"]
        said: set[str] = set()
        try:
            for key, value in state_of(call).items():
                if key.startswith(start):
                    lines.append(f"| `{key}` | {_dtype(value)} | {_shape(value)} | {meaning(key, said)} |")
        except Exception as error:  # whatever the call raises is a fault of the page
            logging.getLogger(__name__).warning("%s: %s", call, error, location=self.get_location(), type="state")
        return [*self.parse_text_to_nodes(f"`{call}`:"), *self.parse_text_to_nodes("\n".join(lines))]


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else type(value).__name__


def _shape(value: Any) -> str:
    numbers = ", ".join(map(str, value.shape)) if isinstance(value, torch.Tensor) else "no tensor"
    return f"[{numbers}]".replace(" ", "\u00a0")  # not to be broken


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("state", StateTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
