"""``tools/style_report.py`` on a package that is small enough to count by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "tools" / "style_report.py"

FIRST = """\
from package.second import Base, helper


class Child(Base):
    def read(self) -> int:
        return helper(1, 2, 3, 4, 5)


def choose(a, b, c):
    a, b, c = c, b, a  # a reason
    for x in a if b else c:  # noqa: B007
        x = 1 if a else 2 if b else 3
    return [y for y in a]
"""

SECOND = '''\
class Base:
    def read(self) -> int:
        """Documented."""
        return 0


def helper(*numbers) -> int:
    return sum(n for n in numbers)


def unused() -> None:
    pass


def _private() -> None:
    pass
'''

USER = "def use(child):\n    return child.read()\n"

COUNTED = {
    "function_median": 2,
    "function_max": 5,
    "return_types": 100 * 5 / 7,
    "named_docstrings": 100 * 1 / 6,
    "docstrings": 100 * 1 / 6,
    "used_docstrings": 100 * 2 / 3,  # both read() are documented, one by its base class; helper() is not
    "ternaries": 1000 * 3 / 31,
    "comprehensions": 1000 * 2 / 31,
    "comments": 1000 * 1 / 31,
    "comments_and_pragmas": 1000 * 2 / 31,
    "nested_ternaries": 1,
    "for_ternaries": 1,
    "wide_assignments": 1,
    "long_calls": 1,
    "lines": 31,
    "readme_words": 6,
    "what": 1000 * 1 / 8,
    "what_any_case": 1000 * 2 / 8,
}


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("What is\nwhat? Somewhat nothing here.")
    (tmp_path / "docs" / "page.md").write_text("Two words.")
    (tmp_path / "docs" / "page.txt").write_text("what")
    for name, source in {"__init__": "", "first": FIRST, "second": SECOND, "user": USER}.items():
        (folder / f"{name}.py").write_text(source)
    return folder


def test_counts(package: Path) -> None:
    numbers = json.loads(run(package, "--json").stdout)
    assert {name: numbers[name] for name in COUNTED} == {
        name: pytest.approx(v, abs=1e-3) for name, v in COUNTED.items()
    }


def test_check_names_the_place_of_what_breaks_a_limit(package: Path) -> None:
    ran = run(package, "--check")
    assert ran.returncode == 1
    assert "first.py:12" in ran.stderr and "first.py:11" in ran.stderr and "package.second.helper" in ran.stderr
    assert run(package).returncode == 0


def test_check_passes_within_the_limits(tmp_path: Path) -> None:
    good = tmp_path / "good.py"
    good.write_text("# why\ndef f() -> None:\n    pass\n")
    ran = run(good, "--check")
    assert ran.returncode == 0 and ran.stderr == ""


def test_table_shows_every_metric(package: Path) -> None:
    lines = run(package, "--worst").stdout
    assert "before" in lines and "ternaries per 1000 lines" in lines and "first.py: lines 11, 12, 12" in lines
