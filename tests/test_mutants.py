"""``tools/covering_tests.py``: which tests belong to a mutant."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from coverage import CoverageData

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from covering_tests import CoveringTests, statement_in_function

SOURCE = """\
TABLE = (
    1,
)

def outer(
    values,
):
    if any(
        value > 1 for value in values
    ):
        return sum(
            values
        )
    try:
        return values[0]
    except IndexError:
        return 0

@numba.njit(cache=True)
def kernel(x):
    return x + 1
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [(2, None), (9, range(8, 11)), (12, range(11, 14)), (15, range(15, 16)), (17, range(17, 18)), (21, None)],
)
def test_statement_at_a_line(line: int, expected: range | None) -> None:
    assert statement_in_function(ast.parse(SOURCE), line) == expected


def test_tests_that_run_a_line_come_in_the_order_of_their_breadth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("covering_tests.ROOT", tmp_path)
    (tmp_path / "qmerge").mkdir()
    (tmp_path / "qmerge" / "a.py").write_text(SOURCE)
    data = CoverageData(str(tmp_path / "data"))
    for test, lines in (("tests/b.py::broad", [8, 11, 15, 17]), ("tests/b.py::narrow", [8, 11]), ("", [1, 8])):
        data.set_context(test)
        data.add_lines({"qmerge/a.py": lines})
    data.write()
    tests = CoveringTests(tmp_path / "data")
    assert tests.of("qmerge/a.py", 12) == ["tests/b.py::narrow", "tests/b.py::broad"]
    assert tests.of("qmerge/a.py", 17) == ["tests/b.py::broad"]
    assert tests.of("qmerge/a.py", 2) == tests.of("qmerge/a.py", 21) == tests.of("qmerge/a.py", 12), "the whole module"
