"""The index of error messages, made of the places in the code that raise them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markup import cell, literal

from qmerge import errors as qmerge_errors
from qmerge.errors import QmergeError

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "qmerge"
REPOSITORY = "https://github.com/qmerge/qmerge"

CLASSES = {
    name: value for name, value in vars(qmerge_errors).items()
    if isinstance(value, type) and issubclass(value, QmergeError) and value is not QmergeError
}  # fmt: skip

RECIPE = PACKAGE / "recipe"
"""Its functions return what is wrong, and one place raises it."""

FEWEST_WORDS = 3
"""A shorter constant text says too little to be found by it."""

HEAD = """# Error messages

Every message that qmerge ends with on purpose, by exit code. Search for a part of yours without names of your own: words in
*italics* stand for names, numbers and shapes. Each message leads to the line of the code that knows more. In Python, the
exception has the name of the heading ([errors](python.md)).

Exit codes without a message of this kind: 0 (done), 1 (a bug: please report the traceback), 5 (done, but past `--min-kept` or
`--max-kl-ratio`). [All exit codes](command-line.md#exit-codes).

This page is made of the code.
"""


@dataclass(frozen=True, order=True)
class Message:
    """One message: the class that carries it, its text as HTML, and where it is raised."""

    error: str
    path: str
    line: int
    text: str


def errors() -> str:
    """Markdown: messages by exit code and class."""
    found = sorted(messages())
    parts = [HEAD]
    for code in sorted({error.exit_code for error in CLASSES.values()}):
        parts.append(f"## Exit code {code}")
        for name in [name for name, error in CLASSES.items() if error.exit_code == code]:
            mine = [message for message in found if message.error == name]
            if mine:
                parts.append(f"### {name}\n\n{cell(CLASSES[name].__doc__ or '')}\n\n{_listed(mine)}")
    return "\n\n".join(parts) + "\n"


def _listed(found: list[Message]) -> str:
    address = f"{REPOSITORY}/blob/main/"
    return "\n".join(f"- {message.text} [code]({address}{message.path}#L{message.line})" for message in found)


def messages() -> Iterator[Message]:
    """Every message in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for error, text in _raised(node, path):
                shown = _shown(text)
                if len(shown.split()) >= FEWEST_WORDS:
                    yield Message(error, path.relative_to(ROOT).as_posix(), node.lineno, shown)  # type: ignore[attr-defined]


def _raised(node: ast.AST, path: Path) -> Iterator[tuple[str, ast.expr]]:
    """The class and the message of an error that is made here, if one is."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
        if node.func.id in CLASSES:
            yield node.func.id, node.args[0]
        elif node.func.id == "error":  # the caller says which class it is
            yield "InputError", node.args[0]
        elif node.func.id == "ValueError" and path.parent == RECIPE:
            yield "RecipeError", node.args[0]
    elif (
        isinstance(node, ast.Return) and path.parent == RECIPE and isinstance(node.value, ast.JoinedStr | ast.Constant)
    ):
        yield "RecipeError", node.value


def _shown(text: ast.expr) -> str:
    """A message as HTML; what is only known when it is raised is named in italics. Empty if nothing is known here."""
    if isinstance(text, ast.Constant):
        return literal(text.value) if isinstance(text.value, str) else ""
    if isinstance(text, ast.JoinedStr):
        return "".join(_shown(part) for part in text.values)
    if isinstance(text, ast.FormattedValue):
        return f"<i>{literal(_name(text.value))}</i>"
    if isinstance(text, ast.BinOp):
        return _shown(text.left) + _shown(text.right)
    return ""


def _name(value: ast.expr) -> str:
    """One word for a value: ``plan.recipe.base`` → base, ``listed(names)`` → names."""
    if isinstance(value, ast.Name):
        return value.id.strip("_").replace("_", " ")
    if isinstance(value, ast.Attribute):
        return value.attr.strip("_").replace("_", " ")
    if isinstance(value, ast.Call) and value.args:
        return _name(value.args[0])
    return "…"
