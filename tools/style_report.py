"""Measure how a Python package reads: function length, ternaries, comprehensions, comments, docstrings, words of the docs.

    python tools/style_report.py [PATH ...] [--check] [--worst] [--json]

Without a PATH it measures the qmerge package next to this script, with README.md and docs/*.md. A PATH is a package folder, a
.py file or a .md file; a package folder also brings the README.md and docs/*.md next to it. Standard library only.

How the numbers are counted:

- "per 1000 lines" divides by all lines, blank ones included. (Dividing by non-blank lines gives values 24 % higher.)
- Function length: from the `def` line to the last line, without decorators; methods, nested and async functions included.
- Return types: functions with a return annotation, `__init__` included.
- "Functions without _": the function's own name has no leading underscore; functions inside functions included.
- A function is public when no part of its dotted name (module, class, function) starts with an underscore; `__init__.py`
  counts as its folder. Functions inside functions are not public.
- A public function is used by another module when one imports it or reads it as an attribute of the imported module. Methods
  are matched by name: a method counts as used when another module reads any attribute of that name. Functions that are only
  called through a plug-in registry are not seen.
- An overriding method counts as documented when a base class in the package documents it. This holds for the used functions
  only; the other two docstring rows look at the function itself.
- Comments: comment tokens without pragmas (`type:`, `noqa`, `fmt:`). "Comments and pragmas" counts every comment token.
- A ternary is nested when it is anywhere inside another one. The header of a `for` is its target and its iterable, in
  statements and in comprehensions.
- "what" is counted in lower case. ("what or What" counts both.) A word of the docs is anything between white space.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import statistics
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORST_FILES = 10
PRAGMA = re.compile(r"#\s*(type:|noqa|fmt:)")

Function = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
COMPOUND = (ast.If, ast.Try, ast.With)


@dataclass(frozen=True)
class Metric:
    """One row of the report. ``before``: the value at commit 4b4fba9. ``limit``: what ``--check`` asks for, if anything."""

    key: str
    label: str
    before: float
    at_most: float | None = None
    at_least: float | None = None

    def holds(self, value: float) -> bool:
        """Whether the value is inside the limit; True without a limit."""
        if self.at_most is not None and value > self.at_most:
            return False
        return self.at_least is None or value >= self.at_least

    @property
    def limit(self) -> str:
        """``≤ 12``, ``≥ 25``, or nothing."""
        if self.at_most is not None:
            return f"≤ {self.at_most:g}"
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return ""


METRICS = (
    Metric("function_median", "function length, median", 6, at_most=9),
    Metric("function_p90", "function length, 90th percentile", 18),
    Metric("function_max", "function length, longest", 52),
    Metric("return_types", "functions with return type, %", 100),
    Metric("named_docstrings", "functions without _ with docstring, %", 60.1),
    Metric("docstrings", "public functions with docstring, %", 64.1),
    Metric("used_docstrings", "… that another module uses, %", 79.3, at_least=95),
    Metric("ternaries", "ternaries per 1000 lines", 27.5, at_most=12),
    Metric("comprehensions", "comprehensions per 1000 lines", 43.9, at_most=22),
    Metric("comments", "comments per 1000 lines", 7.3, at_least=25),
    Metric("comments_and_pragmas", "comments and pragmas per 1000 lines", 13.5),
    Metric("nested_ternaries", "nested ternaries", 15, at_most=0),
    Metric("for_ternaries", "ternaries in a `for` header", 9, at_most=0),
    Metric("wide_assignments", "tuple assignments, more than 2 targets", 95),
    Metric("long_calls", "calls, more than 4 positional arguments", 140),
    Metric("lines", "lines of Python", 20204),
    Metric("readme_words", "README words", 3937),
    Metric("what", '"what" per 1000 words of docs', 8.9),
    Metric("what_any_case", '"what or What" per 1000 words', 11.3),
)


@dataclass
class Module:
    """One parsed file. ``name`` is dotted; ``places`` maps a metric to the line numbers where the file adds to it."""

    path: Path
    name: str
    source: str
    is_package: bool = False
    places: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source, str(self.path))
        self.lines = len(self.source.splitlines())

    def is_public(self) -> bool:
        """No part of the dotted name starts with an underscore."""
        return not any(part.startswith("_") for part in self.name.split("."))


@dataclass(frozen=True)
class Named:
    """A public function: where it is, and the class that it belongs to, if any."""

    module: Module
    node: Function
    owner: ast.ClassDef | None = None

    @property
    def name(self) -> str:
        """``module.function`` or ``module.Class.method``."""
        middle = f".{self.owner.name}" if self.owner else ""
        return f"{self.module.name}{middle}.{self.node.name}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read_modules(paths: Iterable[Path]) -> list[Module]:
    """Every .py file of the paths, parsed."""
    modules: list[Module] = []
    for path in paths:
        if path.is_dir():
            modules += [read_module(file, path.parent) for file in sorted(path.rglob("*.py"))]
        elif path.suffix == ".py":
            modules.append(read_module(path, path.parent))
    return modules


def read_module(file: Path, root: Path) -> Module:
    """``root/package/part.py`` → the module ``package.part``."""
    parts = file.relative_to(root).with_suffix("").parts
    is_package = parts[-1] == "__init__" and len(parts) > 1
    if is_package:
        parts = parts[:-1]
    return Module(file, ".".join(parts), file.read_text(encoding="utf-8"), is_package)


def documents(paths: Iterable[Path]) -> dict[Path, str]:
    """README.md and docs/*.md next to every package folder, and the .md files that were named."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            files += [path.parent / "README.md", *sorted((path.parent / "docs").glob("*.md"))]
        elif path.suffix == ".md":
            files.append(path)
    return {file: file.read_text(encoding="utf-8") for file in dict.fromkeys(files) if file.is_file()}


# --- what one file has -----------------------------------------------------------------------------------------------


def find_places(module: Module) -> dict[str, list[int]]:
    """Metric → line numbers of what it counts in this file."""
    nodes = list(ast.walk(module.tree))
    ternaries = [node for node in nodes if isinstance(node, ast.IfExp)]
    tokens = list(tokenize.generate_tokens(io.StringIO(module.source).readline))
    comments = [token for token in tokens if token.type == tokenize.COMMENT]
    return {
        "ternaries": lines_of(ternaries),
        "comprehensions": lines_of(node for node in nodes if isinstance(node, COMPREHENSIONS)),
        "nested_ternaries": lines_of(inner_ternaries(ternaries)),
        "for_ternaries": lines_of(inner_ternaries(for_headers(nodes))),
        "wide_assignments": lines_of(wide_assignments(nodes)),
        "long_calls": lines_of(node for node in nodes if isinstance(node, ast.Call) and len(node.args) > 4),
        "comments": [token.start[0] for token in comments if not PRAGMA.match(token.string)],
        "comments_and_pragmas": [token.start[0] for token in comments],
    }


def lines_of(nodes: Iterable[ast.expr | ast.stmt]) -> list[int]:
    """Line numbers, in order."""
    return sorted(node.lineno for node in nodes)


def inner_ternaries(nodes: Iterable[ast.AST]) -> list[ast.IfExp]:
    """Every ternary inside one of the nodes, once; a node itself does not count as inside."""
    found: dict[int, ast.IfExp] = {}
    for node in nodes:
        for child in ast.iter_child_nodes(node):
            for inner in ast.walk(child):
                if isinstance(inner, ast.IfExp):
                    found[id(inner)] = inner
    return list(found.values())


def for_headers(nodes: Iterable[ast.AST]) -> list[ast.AST]:
    """Targets and iterables of every ``for``, as tuples."""
    loops = [node for node in nodes if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension)]
    return [ast.Tuple([loop.target, loop.iter], ast.Load()) for loop in loops]


def wide_assignments(nodes: Iterable[ast.AST]) -> Iterator[ast.Assign]:
    """``a, b, c = …``."""
    for node in nodes:
        if isinstance(node, ast.Assign):
            tuples = [target for target in node.targets if isinstance(target, ast.Tuple | ast.List)]
            if any(len(target.elts) > 2 for target in tuples):
                yield node


def functions(modules: Iterable[Module]) -> list[Function]:
    """Every function, however deep."""
    return [node for module in modules for node in ast.walk(module.tree) if isinstance(node, FUNCTIONS)]


# --- public functions ------------------------------------------------------------------------------------------------


def public_functions(module: Module) -> Iterator[Named]:
    """Public functions of a public module and methods of its public classes."""
    if module.is_public():
        yield from public_in(module, module.tree.body, None)


def public_in(module: Module, body: list[ast.stmt], owner: ast.ClassDef | None) -> Iterator[Named]:
    """The same for one block; functions under ``if`` and ``try`` count."""
    for node in body:
        if isinstance(node, COMPOUND):
            yield from public_in(module, node.body, owner)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_in(module, node.body, node)
        elif isinstance(node, FUNCTIONS) and not node.name.startswith("_"):
            yield Named(module, node, owner)


class Uses:
    """Who reads which name: imported functions by module and name, attributes by name."""

    def __init__(self, modules: list[Module]) -> None:
        self.modules = {module.name: module for module in modules}
        self.imported: set[tuple[str, str]] = set()
        self.readers: dict[str, set[str]] = {}
        for module in modules:
            self._read(module)

    def _read(self, module: Module) -> None:
        aliases = self._read_imports(module)
        for node in ast.walk(module.tree):
            if not isinstance(node, ast.Attribute):
                continue
            self.readers.setdefault(node.attr, set()).add(module.name)
            owner = aliases.get(ast.unparse(node.value))
            if owner is not None:
                self.imported.add((owner, node.attr))

    def _read_imports(self, module: Module) -> dict[str, str]:
        """Record what the module imports by name. Returns its names for whole modules: ``np`` → ``numpy``."""
        aliases: dict[str, str] = {}
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Import):
                aliases |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                source = absolute(module, node)
                for alias in node.names:
                    self.imported.add((source, alias.name))
                    aliases[alias.asname or alias.name] = f"{source}.{alias.name}"
        return {name: target for name, target in aliases.items() if target in self.modules}

    def uses(self, function: Named) -> bool:
        """Whether another module uses the function."""
        if function.owner is None:
            return (function.module.name, function.node.name) in self.imported
        return bool(self.readers.get(function.node.name, set()) - {function.module.name})


def absolute(module: Module, node: ast.ImportFrom) -> str:
    """The dotted module of ``from … import``, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    # One dot is the package itself: a package's __init__ stays where it is, a plain module goes up one.
    climbed = node.level - module.is_package
    kept = parts[: len(parts) - climbed]
    return ".".join([*kept, node.module] if node.module else kept)


class Documented:
    """Which functions have a docstring, their own or that of the base class's method."""

    def __init__(self, modules: list[Module]) -> None:
        nodes = [node for module in modules for node in ast.walk(module.tree)]
        self.classes: dict[str, list[ast.ClassDef]] = {}
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                self.classes.setdefault(node.name, []).append(node)

    def __call__(self, function: Named) -> bool:
        if ast.get_docstring(function.node):
            return True
        return function.owner is not None and self._inherited(function.owner, function.node.name, set())

    def _inherited(self, owner: ast.ClassDef, method: str, seen: set[str]) -> bool:
        for base in owner.bases:
            name = ast.unparse(base).split("[")[0].rpartition(".")[2]
            if name in seen:
                continue
            seen.add(name)
            for parent in self.classes.get(name, []):
                if documents_method(parent, method) or self._inherited(parent, method, seen):
                    return True
        return False


def documents_method(owner: ast.ClassDef, method: str) -> bool:
    """Whether the class defines the method with a docstring."""
    methods = [node for node in owner.body if isinstance(node, FUNCTIONS) and node.name == method]
    return any(ast.get_docstring(node) for node in methods)


# --- the numbers -----------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """``numbers``: metric → value; ``undocumented``: used public functions without a docstring, as ``file:line name``."""

    numbers: dict[str, float]
    modules: list[Module]
    undocumented: list[str]


def measure(paths: list[Path]) -> Report:
    """All metrics of the paths."""
    modules = read_modules(paths)
    for module in modules:
        module.places = find_places(module)
    public = [function for module in modules for function in public_functions(module)]
    uses = Uses(modules)
    documented = Documented(modules)
    used = [function for function in public if uses.uses(function)]
    bare = [function for function in used if not documented(function)]
    numbers = {
        **function_numbers(functions(modules)),
        "docstrings": percent(sum(ast.get_docstring(f.node) is not None for f in public), len(public)),
        "used_docstrings": percent(len(used) - len(bare), len(used)),
        **code_numbers(modules),
        **text_numbers(documents(paths)),
    }
    return Report(numbers, modules, [f"{place(f.module)}:{f.node.lineno} {f.name}" for f in bare])


def function_numbers(found: list[Function]) -> dict[str, float]:
    """Lengths in lines, and the shares with a return type and with a docstring."""
    named = [node for node in found if not node.name.startswith("_")]
    lengths = sorted((node.end_lineno or node.lineno) - node.lineno + 1 for node in found) or [0]
    return {
        "function_median": statistics.median(lengths),
        "function_p90": lengths[int(0.9 * len(lengths))],
        "function_max": lengths[-1],
        "return_types": percent(sum(node.returns is not None for node in found), len(found)),
        "named_docstrings": percent(sum(ast.get_docstring(node) is not None for node in named), len(named)),
    }


def code_numbers(modules: list[Module]) -> dict[str, float]:
    """What the files have, added up: rates per 1000 lines, counts for what should not occur at all."""
    lines = sum(module.lines for module in modules)
    totals: Counter[str] = Counter()
    for module in modules:
        totals.update({key: len(places) for key, places in module.places.items()})
    rates = ("ternaries", "comprehensions", "comments", "comments_and_pragmas")
    counts = ("nested_ternaries", "for_ternaries", "wide_assignments", "long_calls")
    return {
        **{key: 1000 * totals[key] / max(1, lines) for key in rates},
        **{key: totals[key] for key in counts},
        "lines": lines,
    }


def text_numbers(texts: dict[Path, str]) -> dict[str, float]:
    """Words of the README; the word "what" in all documents."""
    everything = "\n".join(texts.values())
    words = max(1, len(everything.split()))
    return {
        "readme_words": sum(len(text.split()) for file, text in texts.items() if file.name == "README.md"),
        "what": 1000 * len(re.findall(r"\bwhat\b", everything)) / words,
        "what_any_case": 1000 * len(re.findall(r"\b[Ww]hat\b", everything)) / words,
    }


def percent(part: int, whole: int) -> float:
    """100 where there is nothing to count."""
    return 100 * part / whole if whole else 100.0


# --- printing --------------------------------------------------------------------------------------------------------


def table(numbers: dict[str, float]) -> str:
    """before | now | limit, one line per metric."""
    lines = [f"{'':<40} {'before':>8} {'now':>8} {'limit':>7}"]
    for metric in METRICS:
        value = numbers[metric.key]
        mark = "" if metric.holds(value) else "  broken"
        lines.append(f"{metric.label:<40} {short(metric.before):>8} {short(value):>8} {metric.limit:>7}{mark}".rstrip())
    return "\n".join(lines)


def short(value: float) -> str:
    """One decimal, none where there is none."""
    return f"{value:.1f}".removesuffix(".0")


def place(module: Module) -> str:
    """The file, relative to the current folder where it is inside."""
    resolved = module.path.resolve()
    return str(resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved)


def worst_files(modules: list[Module], key: str) -> list[str]:
    """The files that add most to one metric: how often, how often per 1000 lines, and the first lines."""
    ranked = sorted(modules, key=lambda module: -len(module.places[key]))
    lines = []
    for module in ranked[:WORST_FILES]:
        places = module.places[key]
        if places:
            rate = 1000 * len(places) / module.lines
            shown = ", ".join(map(str, places[:8]))
            more = ", …" if len(places) > 8 else ""
            lines.append(f"  {len(places):>3}  {rate:>5.1f} per 1000  {place(module)}: lines {shown}{more}")
    return lines


def silent_files(modules: list[Module]) -> list[str]:
    """The files that lack most comments."""
    wanted = next(metric.at_least or 0 for metric in METRICS if metric.key == "comments") / 1000
    ranked = sorted(modules, key=lambda module: len(module.places["comments"]) - wanted * module.lines)
    return [f"  {len(m.places['comments'])} in {m.lines} lines  {place(m)}" for m in ranked[:WORST_FILES]]


def offenders(report: Report, key: str) -> list[str]:
    """Where a limit is broken: each place for what should not occur, the worst files for rates."""
    if key == "used_docstrings":
        return [f"  {line}" for line in report.undocumented]
    if key in ("nested_ternaries", "for_ternaries"):
        return [f"  {place(module)}:{line}" for module in report.modules for line in module.places[key]]
    if key in ("ternaries", "comprehensions"):
        return worst_files(report.modules, key)
    if key == "comments":
        return silent_files(report.modules)
    return []


def check(report: Report) -> list[str]:
    """One block of lines per broken limit; empty when all hold."""
    lines: list[str] = []
    for metric in METRICS:
        value = report.numbers[metric.key]
        if not metric.holds(value):
            lines.append(f"{metric.label}: {short(value)}, limit {metric.limit}")
            lines += offenders(report, metric.key)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0; 1 with ``--check`` when a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", nargs="*", type=Path, help="package folder, .py or .md file (default: qmerge)")
    parser.add_argument("--check", action="store_true", help="exit with 1 when a limit is broken, and print where")
    parser.add_argument("--worst", action="store_true", help="list the files with most ternaries and comprehensions")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    given = parser.parse_args(arguments)
    report = measure(given.path or [ROOT / "qmerge"])
    broken = check(report) if given.check else []
    if given.json:
        print(json.dumps({key: round(value, 3) for key, value in report.numbers.items()}, indent=1))
    else:
        print(table(report.numbers))
    if given.worst:
        for key in ("ternaries", "comprehensions"):
            print("\n".join([f"\n{key}: the {WORST_FILES} files with most", *worst_files(report.modules, key)]))
    if broken:
        print("\n" + "\n".join(broken), file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
