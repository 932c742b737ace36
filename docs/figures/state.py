"""State bytes per parameter of GPT-2 124M, from `python -m benchmarks.memory`."""

from figures import BLUE, GREY, ORANGE, axes, table
from matplotlib.figure import Figure

# The name in the results, and the one in the figure.
OTHERS = {
    "torch AdamW": "AdamW",
    "bitsandbytes AdamW8bit": "AdamW, 8 bits\n(bitsandbytes)",
    "Shampoo, 32 bits": "Shampoo, 32 bits",
    "pytorch_optimizer SOAP": "SOAP\n(pytorch_optimizer)",
    "HeavyBall SOAP": "SOAP\n(HeavyBall)",
}
OURS = {
    "Shampoo, 4 bits, moments 4": "Shampoo, 4 bits",
    "Shampoo, 2 bits, moments 4": "Shampoo, 2 bits",
    "Shampoo, 1 bit, moments 4": "Shampoo, 1 bit",
}


def draw() -> Figure:
    found = {row["optimizer"]: row["bytes_per_parameter"] for row in table("memory", "state gpt2")}
    names = OTHERS | OURS
    sizes = [found[name] for name in names]
    figure, ax = axes(3.9)
    bars = ax.barh(list(names.values()), sizes, color=[ORANGE if name in OTHERS else BLUE for name in names])
    ax.bar_label(bars, [f"{size:.2f}" for size in sizes], padding=3, color=GREY)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.13 * max(sizes))
    ax.set_xlabel("bytes of optimizer state per parameter")
    ax.set_axisbelow(True)
    ax.grid(visible=False, axis="y")
    return figure
