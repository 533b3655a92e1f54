"""A text file, or the rows of a data set in JSON → documents: texts and chats, in the forms that trainings read.

Sources: TRL's dataset formats (``text``, ``messages``, ``prompt`` and ``completion``), ShareGPT (``conversations``), Stanford
Alpaca (``instruction``, ``input``, ``output``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.errors import RecipeError

JSON_SUFFIXES = (".jsonl", ".json")

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Exchange:
    """A question and its answer: a chat where the tokenizer has a chat template, else a text."""

    question: str
    answer: str

    @property
    def messages(self) -> list[dict[str, Any]]:
        """As a chat."""
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.answer}]

    @property
    def text(self) -> str:
        """As a text."""
        return f"{self.question}\n\n{self.answer}"


Document = str | list[dict[str, Any]] | Exchange
"""A text, the messages of a chat (``role`` and ``content``), or a question with its answer."""


def read_texts(path: Path) -> list[Document]:
    """The documents of a file: all of a plain text, or one for each row of JSON.

    Raises:
        RecipeError: it cannot be read, is not text, or a row has none of the ``FORMS``.
    """
    if path.suffix not in JSON_SUFFIXES:
        return [read_file(path)]
    return [_document(row, where) for where, row in json_rows(path)]


def read_file(path: Path) -> str:
    """The text of a file.

    Raises:
        RecipeError: it cannot be read, or is not text.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as cause:
        raise RecipeError(f"{path}: cannot be read: {cause.strerror}") from cause
    except UnicodeDecodeError as cause:
        raise RecipeError(f"{path}: not UTF-8 text (byte {cause.start}); expected plain text or JSON lines") from cause


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file with one JSON object per line, or with one JSON array of objects; each with its place, for messages.

    Raises:
        RecipeError: it cannot be read, or holds something else.
    """
    content = read_file(path)
    # No line of JSON lines may begin so: each is an object.
    if content.lstrip().startswith("["):
        for number, row in enumerate(_parsed(content, f"{path.name}: not a JSON array"), start=1):
            yield _checked_row(f"{path.name}, row {number}", row)
        return
    for number, line in enumerate(content.splitlines(), start=1):
        if line.strip():
            where = f"{path.name}, line {number}"
            yield _checked_row(where, _parsed(line, f"{where}: expected one JSON object per line"))


def _parsed(text: str, problem: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise RecipeError(f"{problem}: {cause}") from cause


def _checked_row(where: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise RecipeError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return where, row


# --- rows -> documents -----------------------------------------------------------------------------------------------


def _document(row: dict[str, Any], where: str) -> Document:
    for fields, read in FORMS.items():
        if all(field in row for field in fields):
            document = read(row, where, *fields)
            # A field of that name with other content is passed over; the error below lists all fields.
            if document is not None:
                return document
    forms = ", ".join(" and ".join(f"`{field}`" for field in fields) for fields in FORMS)
    raise RecipeError(f"{where}: expected the fields of one of {forms}; found {', '.join(row)[:80]}")


def _text(row: dict[str, Any], _: str, *fields: str) -> str | None:
    """The texts of all fields, one after another, as TRL joins prompt and completion."""
    texts = [row[field] for field in fields]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _chat(row: dict[str, Any], where: str, *fields: str) -> list[dict[str, Any]] | None:
    """The messages of all fields, one after another."""
    messages: list[dict[str, Any]] = []
    for field in fields:
        chat = row[field]
        if not isinstance(chat, list) or not chat or not all(isinstance(message, dict) for message in chat):
            return None
        messages += [_message(message, where) for message in chat]
    return messages


def _completed_prompt(row: dict[str, Any], where: str, *fields: str) -> Document | None:
    """Both are texts, or both are messages."""
    text = _text(row, where, *fields)
    return _chat(row, where, *fields) if text is None else text


def _exchange(row: dict[str, Any], _: str, *fields: str) -> Exchange | None:
    """Alpaca's row: the input, which may be missing, completes the instruction."""
    instruction, answer = (row[field] for field in fields)
    # Alpaca's data has an empty text where there is no input, other data null.
    addition = row.get("input") or ""
    if not all(isinstance(text, str) for text in (instruction, addition, answer)):
        return None
    return Exchange(f"{instruction}\n\n{addition}" if addition else instruction, answer)


FORMS: dict[tuple[str, ...], Callable[..., Document | None]] = {
    ("text",): _text,
    ("messages",): _chat,
    ("conversations",): _chat,
    ("prompt", "completion"): _completed_prompt,
    ("instruction", "output"): _exchange,
}
"""Fields of a row → what reads them, or returns None where they hold something else. The first form that fits is taken."""


def _message(message: dict[str, Any], where: str) -> dict[str, Any]:
    """A message as chat templates expect it. ShareGPT's spelling (``from``, ``value``) is accepted too."""
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if not isinstance(role, str) or content is None:
        raise RecipeError(f"{where}: a message needs `role` and `content`, found {', '.join(message)[:80]}")
    return {**message, "role": SHAREGPT_ROLES.get(role, role), "content": content}
