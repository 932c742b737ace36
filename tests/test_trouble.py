"""docs/trouble.md has every message that the library raises or logs, and none that it does not."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "lowbit_optim").rglob("*.py"), *(ROOT / "kernels").glob("*.py")])
PAGE = (ROOT / "docs/trouble.md").read_text(encoding="utf-8")
# The first column of the page's tables: messages as they begin, with … in the place of what is filled in.
ENTRIES = [entry for _, entry in re.findall(r"^\| (`+)(.+?)\1 \| ", PAGE, re.MULTILINE)]

# Messages that nobody should see who uses what is public, or that say what another one says already.
INTERNAL = {
    "{}: {}": "a file, an index or a row before the message of what it is about",
    "rank {}: {}": "another rank's message",
    "max_file_size: {}": "before the message about bytes",
    "{}": "the message of what it wraps",
    "nothing is computed from the anchor": "an assertion",
    "unknown route {}; the routes are {}": "of a function for tests and benchmarks",
    "{} has one period: its root comes with the update": "an assertion of the storage forms",
    "out is {} {}; what is decoded is {} {}": "an assertion of the kernels",
}
# What is raised or logged of a message that is made elsewhere, and is found there.
PASSED_ON = {
    "own", "problem", "error", "asyncio.CancelledError",  # another's error, or no error
    "NotImplementedError", "AssertionError",  # of methods without a body
    "not_ours(file, error)",  # see manifest.not_ours
}  # fmt: skip


def template(node, named):
    """The text of an expression with {} in the place of what is filled in; None if it is no text."""
    if isinstance(node, ast.Constant):
        return re.sub(r"%[sd]", "{}", node.value) if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_filled(part, named) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # with a condition
        return "{}"
    if isinstance(node, ast.BinOp):
        sides = [template(side, named) for side in (node.left, node.right)]
        return None if sides == [None, None] else "".join(side or "{}" for side in sides)
    if isinstance(node, ast.Name):
        return named.get(node.id)
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "str":
        return "{}"
    return None


def _filled(part, named):
    if isinstance(part, ast.Constant):
        return part.value
    inner = part.value
    if isinstance(inner, ast.Call) and ast.unparse(inner.func) == "where":
        return "parameter {} of shape {}"  # see optimizers.state.where
    return named.get(inner.id, "{}") if isinstance(inner, ast.Name) else "{}"


def constants():
    """The texts that modules and functions have under a name, and lists of texts."""
    found, lists = {}, {}
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                if (text := template(node.value, {})) and (name.strip("_").isupper() or name == "said"):
                    found[name] = text
                if isinstance(node.value, ast.Tuple) and name == "_TROUBLES":
                    lists[file] = [template(part, {}) for part in node.value.elts]
    return found, lists


def messages():
    """{template: where} of all that is raised, logged or warned of; None for what is not understood."""
    named, lists = constants()
    found = {text: str(file) for file, texts in lists.items() for text in texts}
    unknown = []
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            place = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Raise) and node.exc is not None:
                said = _of_raise(node.exc, named)
            elif isinstance(node, ast.Call) and re.search(r"\.warn(ing)?$", ast.unparse(node.func)):
                said = template(node.args[0], named)
                if ast.unparse(node.args[0]) == "message":  # Watch's, which are in the lists
                    continue
            elif isinstance(node, ast.Return) and file.name == "manifest.py" and node.value is not None:
                made = isinstance(node.value, ast.Call) and re.match("damaged|CheckpointError", ast.unparse(node.value))
                said = _of_raise(node.value, named) if made else ""
            else:
                continue
            if said is None:
                unknown.append(f"{place}: {ast.unparse(node)}")
            elif said:
                found.setdefault(said, place)
    return found, unknown


def _of_raise(error, named):
    """The message of an exception; "" if it is made elsewhere."""
    if not isinstance(error, ast.Call):
        return "" if ast.unparse(error) in PASSED_ON else None
    if ast.unparse(error) in PASSED_ON:
        return ""
    # damaged(file, text), BlockingIOError(number, text, ...)
    for argument in error.args[1:] if ast.unparse(error.func) == "damaged" else error.args:
        if (text := template(argument, named)) is not None:
            return text
    return None


FOUND, UNKNOWN = messages()


def fits(entry, message):
    """Whether an entry of the page is the beginning of a message, with … where that has {}."""
    parts = entry.removesuffix("…").split("…")
    return re.match(r"(\{\})+".join(map(re.escape, parts)), message) is not None


def test_every_message_is_understood():
    assert UNKNOWN == []
    assert len(FOUND) > 150


def test_every_message_is_in_the_page():
    assert [
        f"{where}: {message}"
        for message, where in FOUND.items()
        if message not in INTERNAL and not any(fits(entry, message) for entry in ENTRIES)
    ] == []


def test_every_entry_of_the_page_is_a_message():
    assert [entry for entry in ENTRIES if not any(fits(entry, message) for message in FOUND)] == []
    assert INTERNAL.keys() <= FOUND.keys()


def test_entries_are_not_so_short_that_they_fit_anything():
    assert [entry for entry in ENTRIES if len(re.sub(r"[…\s]", "", entry)) < 7] == []


def test_a_message_that_is_not_there_is_found():
    assert not fits("bits is …; it must be one of …", "bits are {}; it must be one of {}")
    assert fits("bits is …; it must", "bits is {}; it must be one of {}")
    assert not fits("bits is … must", "bits is {}; it must be one of {}")
