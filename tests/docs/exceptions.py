"""Code blocks that no test runs or checks, each with its reason. One that is no longer needed or there fails a test.

A block is called by its page and its first line.
"""

EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "CONTRIBUTING.md",
        "kernels, linalg <- storage <- blocking, distributed <- preconditioners <- optimizers <- everything else",
    ): "a rule for people, drawn in words",
}
