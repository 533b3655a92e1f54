"""The tree tells the architecture: few modules on top, imports go down only, and no circle hides anywhere."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qmerge"
MOST_TOP_LEVEL_MODULES = 9


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports: at its top, inside functions and for types alike."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "qmerge":
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                yield inside if inside in MODULES else node.module


def rooms() -> dict[str, set[str]]:
    """Top-level folder or module → those that it imports from. The package's own ``__init__`` is one of them."""
    graph: dict[str, set[str]] = {}
    for name, path in MODULES.items():
        room = top(name)
        graph.setdefault(room, set()).update(top(found) for found in imports(path) if top(found) != room)
    return graph


def top(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def files() -> dict[str, set[str]]:
    return {name: {found for found in imports(path) if found != name} for name, path in MODULES.items()}


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Some way from a node back to itself; empty where there is none."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            found = walk(following, [*path, node])
            if found:
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def test_circles_are_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_imports_between_folders_go_down_only() -> None:
    assert circle(rooms()) == []


def test_imports_between_files_go_down_only() -> None:
    graph = files()
    for name, path in MODULES.items():  # a package's own ``__init__`` may gather what its modules define
        if path.name == "__init__.py":
            graph[name] = {found for found in graph[name] if not found.startswith(f"{name}.")}
    assert circle(graph) == []


def test_few_modules_are_on_top() -> None:
    modules = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(modules) <= MOST_TOP_LEVEL_MODULES, modules


def test_no_module_that_another_folder_imports_is_private() -> None:
    private = {
        f"{name} imports {found}"
        for name, path in MODULES.items()
        for found in imports(path)
        if found.rpartition(".")[2].startswith("_") and found.rpartition(".")[0] not in (name, name.rpartition(".")[0])
    }
    assert not private
