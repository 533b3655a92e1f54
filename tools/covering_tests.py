"""Tests by the lines of qmerge that they run. ``tests/conftest.py`` tells coverage.py which test function is running."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class CoveringTests:
    """Which test functions run a line, from the data of ``make coverage``."""

    def __init__(self, data: Path) -> None:
        from coverage import CoverageData

        self._data = CoverageData(str(data))
        self._data.read()
        files = sorted(name for name in self._data.measured_files() if name.startswith("qmerge/"))
        if not files:
            raise SystemExit(f"{data} holds no measured files: run `make coverage` first")
        self._by_file = {name: self._data.contexts_by_lineno(name) for name in files}
        self._breadth: Counter[str] = Counter()
        for lines in self._by_file.values():
            for tests in lines.values():
                self._breadth.update(tests)

    def of(self, file: str, line: int) -> list[str]:
        """Test functions that run the statement at a line, those that run the fewest lines first."""
        path = ROOT / file
        statement = statement_in_function(ast.parse(path.read_text()), line)
        if statement:
            tests = self._tests(file, statement)
        else:
            without_kernels = path.with_name(path.name.replace("_kernels", "")).relative_to(ROOT).as_posix()
            tests = self._tests_of_functions(file) or self._tests_of_functions(without_kernels)
        return sorted(tests, key=lambda test: (self._breadth[test], test))

    def _tests(self, file: str, lines: range) -> set[str]:
        contexts = self._by_file.get(file, {})
        return {test for line in lines for test in contexts.get(line, ()) if test}

    def _tests_of_functions(self, file: str) -> set[str]:
        path = ROOT / file
        if not path.is_file():
            return set()
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found |= self._tests(file, range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1))
        return found


def statement_in_function(tree: ast.Module, line: int) -> range | None:
    """Lines of the innermost statement at a line (of a compound one: its header); None outside functions, and in compiled
    ones."""
    found: range | None = None

    def visit(body: list[ast.stmt], inside: bool) -> None:
        nonlocal found
        for node in body:
            end = node.end_lineno or node.lineno
            if not node.lineno <= line <= end:
                continue
            is_function = isinstance(node, ast.FunctionDef)
            if is_function and any("jit" in ast.dump(decorator) for decorator in node.decorator_list):
                return
            parts = (getattr(node, name, []) for name in ("body", "orelse", "finalbody", "handlers"))
            inner = [statements for statements in parts if statements]
            header_end = inner[0][0].lineno - 1 if inner else end
            if inside:
                found = range(node.lineno, max(header_end, node.lineno) + 1)
            for statements in inner:
                visit(statements, inside or is_function)

    visit(tree.body, False)
    return found
