"""The table of ``--conformance`` says what has passed, and what has not."""

import pytest

from tests.conformance import COLUMNS
from tests.contract import FIRST_ORDER, OPTIMIZERS

SOME_TESTS = """
    import pytest
    from tests.contract import each

    @each(["kfac", "shampoo", "shampoo-4-bits"])
    def test_it_works(make):
        assert make.optimizer.__name__ == "KFAC"

    @each(["soap"])
    @pytest.mark.parametrize("step", range(3))
    def test_half_of_it_works(make, step):
        if step == 2:
            pytest.skip()
        assert step

    @pytest.fixture
    def broken():
        yield
        raise ValueError

    @each(["caspr"])
    def test_cleaning_up(make, broken):
        pass

    def test_nothing_to_do_with_optimizers():
        pass
"""

TABLE = """
|  | Shampoo | CASPR | K-FAC | AdaBK | EKFAC | SOAP | AdamW | SGD | Adagrad |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| It works | 0 of 2 | - | 1 of 1 | - | - | - | - | - | - |
| Half of it works | - | - | - | - | - | 1 of 2 | - | - | - |
| Cleaning up | - | 0 of 1 | - | - | - | - | - | - | - |
"""


@pytest.mark.parametrize("options", [[], ["-n", "1"]], ids=["here", "in-workers"])
def test_the_table(pytester, options):
    pytester.makepyfile(SOME_TESTS)
    pytester.runpytest_inprocess("-p", "tests.conformance", "--conformance", "table.md", *options)
    assert (pytester.path / "table.md").read_text().endswith(TABLE)


def test_columns_are_the_optimizers():
    """A class without a column would be left out of the table."""
    assert COLUMNS.keys() == {make.optimizer.__name__ for make in (OPTIMIZERS | FIRST_ORDER).values()}
