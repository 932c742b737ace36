"""Every public name has a docstring and an example, examples print what they say, and the reference has all names."""

import re
import sys

import pytest

from tests.extensions import extension

public = extension("public")


def test_every_public_name_has_a_docstring_and_an_example():
    assert [problem for one in public.public().values() for problem in one.lacks()] == []


def test_every_example_prints_what_it_says():
    assert [*public.failures()] == []


def test_every_name_of_the_package_is_public():
    import lowbit_optim

    names = public.public()
    assert {f"lowbit_optim.{name}" for name in lowbit_optim.__all__} <= names.keys()
    assert {"lowbit_optim.KFAC.attach", "lowbit_optim.presets.WANG2024"} <= names.keys()
    assert not [name for name in names if re.search(r"\._", name)]


def undocumented(): ...


def without_example(x):
    """It has x and nothing to show."""


def without_parameter(x):
    """It has something to show.

    Example:
        >>> without_parameter(1)
        2
    """
    return x


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (undocumented, "f has no docstring"),
        (without_example, "f has no example (>>>) in its docstring"),
        (without_parameter, "f does not say what x is"),
    ],
)
def test_a_name_that_lacks_something_is_named(function, said):
    assert [*public.Public("f", function, sys.modules[__name__]).lacks()] == [said]


def test_a_constant_without_a_comment_is_named():
    module = sys.modules["lowbit_optim.presets"]
    assert [*public.Public("lowbit_optim.presets.math", 3, module).lacks()] == [
        "lowbit_optim.presets.math has no docstring"
    ]


def test_an_example_that_prints_something_else_is_named(monkeypatch):
    monkeypatch.setattr(public, "_all_modules", lambda: [sys.modules[__name__]])
    (said,) = public.failures()
    assert f"{__name__}.without_parameter does not print what it says" in said
    assert "Expected:\n    2\nGot:\n    1" in said


def test_a_name_that_is_in_no_page_is_named():
    everything = {*public.public()}
    assert [*public.missing(everything)] == []
    assert [*public.missing(everything - {"lowbit_optim.Shampoo"})] == [
        "lowbit_optim.Shampoo is in no page of docs/reference"
    ]
