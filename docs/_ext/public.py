"""What the library promises: every public name has a docstring, an example that runs, and a place in the reference.

A build warns of each that lacks one, which fails it; tests/test_docstrings.py asks for the same without a build.
"""

import contextlib
import doctest
import importlib
import inspect
import io
import logging
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging as sphinx_logging

PACKAGE = "lowbit_optim"
# Modules whose names are public: all that __all__ lists, or all without an underscore that were defined there.
MODULES = tuple(f"{PACKAGE}{module}" for module in ("", ".checkpoint", ".memory", ".presets", ".shapes", ".storage"))
# Public by their names, but what optimizers and saves ask of each other: not to be relied on.
INTERNAL = {
    "FirstOrder": {"check_state", "create", "kept", "keys", "layout", "takes"},
    "Saving": {"join", "report", "start"},
}


class Public(NamedTuple):
    """A public name."""

    name: str  # "lowbit_optim.Shampoo", by where it is to be imported from
    value: Any
    owner: ModuleType  # that defines it

    @property
    def is_constant(self) -> bool:
        return not (callable(self.value) or isinstance(self.value, property | ModuleType))

    @property
    def doc(self) -> str:
        """Its docstring; of a constant the comment above it, which autodoc shows."""
        if self.is_constant:
            lines = ModuleAnalyzer.for_module(self.owner.__name__).find_attr_docs()
            return "\n".join(lines.get(("", self.name.rpartition(".")[2]), ()))
        return inspect.getdoc(self.value) or ""

    @property
    def examples(self) -> list[doctest.Example]:
        """Those of its docstring; of a constant those of its module in which it is."""
        short = self.name.rpartition(".")[2]
        if self.is_constant:
            return [e for e in doctest.DocTestParser().get_examples(self.owner.__doc__ or "") if short in e.source]
        return doctest.DocTestParser().get_examples(self.doc)

    def lacks(self) -> Iterator[str]:
        if not self.doc.strip():
            yield f"{self.name} has no docstring"
            return
        if not self.examples and not isinstance(self.value, property):  # whose class has one
            yield f"{self.name} has no example (>>>) in its docstring"
        said = self.doc.partition("Example:")[0]
        for name in self._parameters():
            if not re.search(rf"\b{name}\b", said) and "**keywords: as" not in said:
                yield f"{self.name} does not say what {name} is"

    def _parameters(self) -> list[str]:
        """The names of what is to be given to it."""
        if not callable(self.value) or (inspect.isclass(self.value) and issubclass(self.value, Exception)):
            return []
        return [name for name in inspect.signature(self.value).parameters if name != "self"]


def public() -> dict[str, Public]:
    """Every public name: those of ``MODULES``, and what classes among them have by themselves or from the library."""
    places: dict[Any, str] = {}  # where a class or function is to be imported from; classes that nobody imports follow
    found: dict[str, Public] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in getattr(module, "__all__", None) or _own_names(module):
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                one = Public(value.__name__, value, value)
            elif hasattr(value, "__module__"):
                one = Public(
                    places.setdefault(value, f"{path}.{name}"), value, importlib.import_module(value.__module__)
                )
            else:
                owner = _owner_of(module, name)
                one = Public(f"{owner.__name__}.{name}", value, owner)
            found[one.name] = one
    for value in [*places]:
        for kind in value.__mro__ if inspect.isclass(value) else ():
            if kind.__module__.startswith(f"{PACKAGE}."):
                place = places.setdefault(kind, f"{kind.__module__}.{kind.__qualname__}")
                found.update({one.name: one for one in _members(kind, place)})
    return found


def _own_names(module: ModuleType) -> list[str]:
    """The names that a module without ``__all__`` defines, and does not import, without an underscore."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (name.isupper() or getattr(value, "__module__", "") == module.__name__)
    ]


def _members(kind: type, place: str) -> Iterator[Public]:
    """The methods and properties of a class itself."""
    owner = importlib.import_module(kind.__module__)
    for name, value in vars(kind).items():
        hidden = name.startswith("_") or any(name in INTERNAL.get(base.__name__, ()) for base in kind.__mro__)
        # torch puts a wrapped step of a base class into each class that an optimizer is made of.
        own = inspect.isfunction(value) and value.__qualname__ == f"{kind.__qualname__}.{name}"
        if not hidden and (own or isinstance(value, property)):
            yield Public(f"{place}.{name}", value, owner)


def _owner_of(module: ModuleType, name: str) -> ModuleType:
    """The module that defines a constant which others import: the one with a comment above it."""
    for own in (module, *(m for m in vars(module).values() if isinstance(m, ModuleType))):
        if ("", name) in ModuleAnalyzer.for_module(own.__name__).find_attr_docs():
            return own
    return module


def failures() -> Iterator[str]:
    """Run the examples in the docstrings of all modules; what each printed instead of what it says."""
    finder, quiet = doctest.DocTestFinder(exclude_empty=True), logging.getLogger(PACKAGE)
    runner = doctest.DocTestRunner(verbose=False)
    before, quiet.disabled = quiet.disabled, True  # examples show what is warned of
    try:
        for module in _all_modules():
            for test in finder.find(module):
                said = io.StringIO()
                with contextlib.redirect_stdout(io.StringIO()):
                    bad = runner.run(test, out=said.write).failed
                if bad:
                    yield f"the example of {test.name} does not print what it says:\n{said.getvalue()}"
    finally:
        quiet.disabled = before


def _all_modules() -> Iterator[ModuleType]:
    package = importlib.import_module(PACKAGE)
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{PACKAGE}."):
        # __main__ runs, the demo needs an extra, and kernels, which has no examples, needs Triton.
        if not found.name.startswith(tuple(f"{PACKAGE}.{name}" for name in ("__main__", "demo", "kernels"))):
            yield importlib.import_module(found.name)


def missing(documented: set[str]) -> Iterator[str]:
    """Public names that are not among those of the reference's pages."""
    for name in public().keys() - documented:
        yield f"{name} is in no page of docs/reference"


# ---- the build -------------------------------------------------------------------------------------------------------


def check(app: Sphinx, env: BuildEnvironment) -> None:
    logger = sphinx_logging.getLogger(__name__)
    documented = {name for name, _, _, _, _, _ in env.domains["py"].get_objects()}
    for problem in [*(p for one in public().values() for p in one.lacks()), *missing(documented), *failures()]:
        logger.warning("%s", problem, type="public")


def also_at_the_top(app: Sphinx, doctree: nodes.document) -> None:
    """Let every name be found as one of the package itself.

    Of all names that come from one file, viewcode leads back to the module that one of them is documented under.
    """
    for signature in doctree.findall(addnodes.desc_signature):
        alias = f"{PACKAGE}.{signature.get('fullname')}"
        if signature.get("module") and alias not in signature["ids"]:
            signature["ids"].append(alias)


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-check-consistency", check)
    app.connect("doctree-read", also_at_the_top)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
