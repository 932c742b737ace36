"""The paper's Table 1, matrix A2, beside ours: what one quantization does to the inverse fourth root of a matrix.

A2 (Wang et al. 2024) has order 1200, random eigenvectors and two distinct eigenvalues, which the paper does not state;
1150 of one and 50 a thousand times smaller reproduce its figures. For f(A) = A^(-1/4) and a quantization g,
NRE = ||f(A) - f(g(A))|| / ||f(A)|| and AE is the angle between the two in degrees.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.matrices import WIDTHS, angle, bits_per_element, low_bit, power, relative_error, two_level
from benchmarks.report import keep, show
from lowbit_optim.roots import inverse_root
from lowbit_optim.storage import Quantization, Symmetric
from lowbit_optim.storage.eigen import Eigen, Rows
from lowbit_optim.storage.factors import Direct, Factor, put
from lowbit_optim.storage.root import Root

ORDER, LARGE, RATIO, SEED = 1200, 1150, 1000.0, 0


@dataclass
class Case:
    """One row: a form, what is quantized in it, and the paper's (NRE, AE) where it has the row."""

    label: str
    form: Factor
    paper: tuple[float, float] | None = None


def cases() -> list[Case]:
    rows = []
    papers = {
        "linear-2": [(0.4465, 15.338), (0.0942, 5.3998), (0.0669, 3.8166), (0.0661, 3.7887)],
        "dynamic": [(0.4615, 17.189), (0.1224, 7.0144), (0.0878, 4.9960), (0.0853, 4.891)],
    }
    for codebook, figures in papers.items():
        code = Quantization(4, codebook)
        square = Symmetric(code, "square")
        forms = [
            ("A itself", Direct(codec=square)),
            ("eigenvectors", Eigen(vectors=Rows(code), codec=square, rectify_update=0)),
            ("eigenvectors, rectified", Eigen(vectors=Rows(code), codec=square, rectify_update=1)),
            ("root alone", Root(codec=square)),
        ]
        rows += [Case(f"{codebook}: {what}", f, paper) for (what, f), paper in zip(forms, figures, strict=True)]
    return rows + [Case(f"ours: root, bits={bits}", low_bit("root", bits)) for bits in WIDTHS]


def dequantized_root(form: Factor, values: Tensor, vectors: Tensor) -> Tensor:
    """f(g(A)): the root itself where the form keeps it alone, else that of the statistic which the form gives back."""
    state = form.init(1, ORDER, torch.float64, "cpu")
    if isinstance(form, Root):
        exact = power(values, vectors, -1 / 4)[None]
        return form.codec.decode(form.codec.encode(exact), torch.float64)[0]
    if isinstance(form, Eigen):
        state |= {"eigenvalues": values.float()[None], **put("eigenvectors", form.vectors.encode(vectors[None]))}
    elif isinstance(form, Direct):
        state |= put("statistic", form.codec.encode(power(values, vectors, 1.0)[None]))
    return inverse_root(form.statistic(state, torch.float64), 4, form.eps)[0][0]


def main() -> None:
    values, vectors = two_level(ORDER, LARGE, RATIO, torch.Generator().manual_seed(SEED))
    exact = power(values, vectors, -1 / 4)
    rows = []
    for case in cases():
        got = dequantized_root(case.form, values, vectors)
        paper = case.paper or (None, None)
        rows.append(
            {
                "what is quantized": case.label,
                "NRE": relative_error(got, exact).item(),
                "AE": angle(got, exact).item(),
                "paper's NRE": paper[0],
                "paper's AE": paper[1],
                "bits/element": bits_per_element(case.form, ORDER),
            }
        )
    note = (
        "bits/element: everything a factor keeps between steps (statistic and root), over the elements of its square.\n"
        "A itself: rounding makes it indefinite; here negative eigenvalues count as zero, the paper does not say."
    )
    show(f"One quantization at order {ORDER}, 4 bits unless said: error of A^(-1/4)", rows, note)
    keep("quantization_error", {"A2": rows})


if __name__ == "__main__":
    main()
