"""The error of A^(-1/4) after one coding, from `python -m benchmarks.quantization_error`."""

from figures import markdown, table

NAMES = {
    "linear-2: A itself": "A itself, 4-bit square",
    "linear-2: eigenvectors": "eigenvectors, 4-bit square",
    "linear-2: eigenvectors, rectified": "the same, rectified once",
    "linear-2: root alone": "A^(-1/4), 4-bit square",
    "ours: root, bits=4": "A^(-1/4), `bits=4`",
    "ours: root, bits=2": "A^(-1/4), `bits=2`",
    "ours: root, bits=1": "A^(-1/4), `bits=1`",
}


def write() -> str:
    found = {row["what is quantized"]: row for row in table("quantization_error", "A2")}
    rows = {title: found[name] for name, title in NAMES.items()}
    return markdown(
        [
            {
                "what is coded": title,
                "relative error": f"{row['NRE']:.3g}",
                "angle": f"{row['AE']:.2g}°",
                "published": f"{row['''paper's NRE''']:.3g}" if row["paper's NRE"] else "-",
            }
            for title, row in rows.items()
        ]
    )
