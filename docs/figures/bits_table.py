"""What `bits` means: the codes that the default storage and its kin make of it, and what one factor then takes."""

from figures import markdown

from benchmarks.matrices import bits_per_element, low_bit
from lowbit_optim.storage import Quantization
from lowbit_optim.storage.budget import BITS
from lowbit_optim.storage.factors import Factor

ORDER = 1024


def codes(factor: Factor) -> str:
    codec = factor.codec.codec  # type: ignore[attr-defined]
    if not isinstance(codec, Quantization):
        return str(codec).removeprefix("torch.")
    return f"{codec.bits} bits, table `{codec.codebook}`, {'fitted' if codec.scale == 'fitted' else 'largest'} scale"


def write() -> str:
    forms = {bits: low_bit("root", bits) for bits in BITS if bits != 32}
    return markdown(
        [
            {
                "`bits=`": str(bits),
                "a number below the diagonal": codes(factor),
                f"bits per element at order {ORDER}, all counted": f"{bits_per_element(factor, ORDER):.2f}",
            }
            for bits, factor in forms.items()
        ]
    )
