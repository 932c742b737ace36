"""The extensions of the documentation site, as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("sphinx", reason="docs/_ext are extensions of Sphinx, which only the extra `docs` installs")

ROOT = Path(__file__).parents[1]


def extension(name: str) -> ModuleType:
    """docs/_ext/<name>.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/_ext/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
