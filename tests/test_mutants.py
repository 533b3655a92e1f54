"""``tools/mutants.py``: which changes are mutants, and the sample of them; ``tools/covering_tests.py``: their tests."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from coverage import CoverageData

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import mutants
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


FUNCTION = """\
@cache
def area(width: int, *, height: float = 2) -> float:
    \'\'\'Of a rectangle.\'\'\'
    total: float = width * height
    return total
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@cache\n", ""), ("width: int", "width: str"), ("-> float", "-> int"), ("total: float", "total: int"),
        ("Of a rectangle", "Of a circle"), ("*, height", "/, height"),
    ],
)  # fmt: skip
def test_changes_without_a_meaning(old: str, new: str) -> None:
    changed = FUNCTION.replace(old, new)
    assert changed != FUNCTION and mutants.meaning(changed) == mutants.meaning(FUNCTION)


@pytest.mark.parametrize(
    ("old", "new"),
    [("width * height", "width / height"), ("= 2", "= 3"), ("return total", "return -total"), ("*, height", "*height")],
)
def test_changes_with_a_meaning(old: str, new: str) -> None:
    assert mutants.meaning(FUNCTION.replace(old, new)) != mutants.meaning(FUNCTION)


def test_what_is_no_python_has_no_meaning() -> None:
    assert mutants.meaning("def f(") is None


PLACES = {"formats": 30, "rounding": 5, "merge": 30, "names": 30}
"""Part → places in its code where something can be changed."""

CHANGES = {"two": "x = 2", "three": "x = 3", "nothing": "x = 1"}
"""Operator → what it makes of a line."""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One file for each part. Its lines have two mutants each, but every second line has only one, which changes nothing."""

    def mutants_of(part: str, path: Path) -> Iterator[mutants.Mutant]:
        for line in range(1, PLACES[part] + 1):
            for operator in ("two", "three") if line % 2 else ("nothing",):
                yield mutants.Mutant(part, path.name, operator, line - 1, line, 0)

    def mutated(source: str, operator: str, occurrence: int) -> str:
        lines = source.splitlines()
        lines[occurrence] = CHANGES[operator]
        return "\n".join(lines)

    for part, count in PLACES.items():
        (tmp_path / f"{part}.py").write_text("x = 1\n" * count)
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    monkeypatch.setattr(mutants, "files_of", lambda part: [tmp_path / f"{part}.py"])
    monkeypatch.setattr(mutants, "mutants_of", mutants_of)
    monkeypatch.setattr(mutants, "mutated", mutated)


@pytest.mark.usefixtures("parts")
def test_a_sample_has_as_many_of_each_part_in_turn() -> None:
    """Of a part with fewer mutants, all of them."""
    sample = mutants.draw(16, seed=0)
    assert [mutant.part for mutant in sample] == 3 * ["formats", "rounding", "merge", "names"] + [
        "formats", "merge", "names"
    ]  # fmt: skip
    places = [(mutant.file, mutant.line) for mutant in sample]
    assert len(set(places)) == len(places), "one change at each place"
    assert {mutant.operator for mutant in sample} == {"two", "three"}, "any of its changes, if it has a meaning"


@pytest.mark.usefixtures("parts")
def test_a_sample_depends_on_its_seed() -> None:
    assert mutants.draw(16, seed=0) == mutants.draw(16, seed=0) != mutants.draw(16, seed=1)
