"""The learning rates that tuning has found, from the runs that benchmarks.convergence compares."""

from figures import markdown

from benchmarks.convergence import TUNING_SEED
from benchmarks.report import RESULTS, read_lines

TASKS = {
    "digits-mlp": "digits, MLP",
    "fashion-convnet": "Fashion-MNIST, ConvNet",
    "fashion-vit": "Fashion-MNIST, ViT",
    "shakespeare-gpt": "Shakespeare, GPT",
}
METHODS = {
    "shampoo-32": "Shampoo",
    "caspr-32": "CASPR",
    "kfac-32": "K-FAC",
    "adabk-32": "AdaBK",
    "soap10-32": "SOAP",
}


def write() -> str:
    rates: dict[tuple[str, str], float] = {}
    for run in read_lines(RESULTS / "convergence.jsonl"):
        if run["seed"] != TUNING_SEED:
            rate = rates.setdefault((run["task"], run["method"]), run["lr"])
            assert rate == run["lr"], f"{run['task']}, {run['method']}: seeds were run at {rate} and at {run['lr']}"

    def of(task: str, method: str) -> str:
        rate, base = rates.get((task, method)), rates[task, "adamw"]
        return f"{rate:g} (× {rate / base:.1f})" if rate else "-"

    return markdown(
        [
            {"best rate of": title, "AdamW": f"{rates[task, 'adamw']:g}"}
            | {name: of(task, method) for method, name in METHODS.items()}
            for task, title in TASKS.items()
        ]
    )
