"""The journal of a run, in the output folder, from which ``--resume`` continues.

    first line           identity of the run: version, recipe, SHA-256 of every input
    a line per step      when it is done: SHA-256 of the tensors that it wrote, and its measurements
    a line per file      when it is whole: size and SHA-256

A resumed run does not trust the lines: it hashes the bytes that are on the disk.
"""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from qmerge.errors import RecipeError
from qmerge.safetensors_io.writer import no_room_is_an_error

NAME = ".qmerge-journal.jsonl"

STEP_FIELDS = frozenset({"step", "sha256", "texts", "outcome"})


class Journal:
    """Lines of JSON that are only appended. Threads may share one.

    Args:
        identity: settings and inputs; a run can only be resumed with equal ones.
        resume: continue the journal of an earlier run, if there is one.

    Attributes:
        steps: name of a step → its record, of the earlier run.
        files: name of a file → its record, of this run.

    Raises:
        RecipeError: the earlier run has another identity.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], resume: bool) -> None:
        self.path = folder / NAME
        self.steps: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if resume and self.path.exists():
            self._load(identity)
        else:
            self.path.write_text("")
            self._append({"run": identity})

    def step_done(self, name: str, record: dict[str, Any]) -> None:
        """Record a finished step: ``sha256`` of its tensors, their ``texts``, its ``outcome``."""
        self._append({"step": name, **record})

    def file_done(self, name: str, record: dict[str, Any]) -> None:
        """Record a finished file, and sync: it gets its final name after this."""
        self.files[name] = record
        self._append({"file": name, **record}, sync=True)

    def remove(self) -> None:
        """Delete the journal: the output folder is finished."""
        self.path.unlink()

    def _append(self, line: dict[str, Any], sync: bool = False) -> None:
        data = (json.dumps(line) + "\n").encode()
        # One write per line: after a kill, only the last one can be incomplete.
        with self._lock, no_room_is_an_error(self.path.parent), self.path.open("ab") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def _load(self, identity: dict[str, Any]) -> None:
        """Take over the lines that are whole.

        A kill or a power cut may have damaged any line. Its step is then done again, which costs time, but no bytes.
        """
        records: list[dict[str, Any]] = []
        for line in self.path.read_bytes().split(b"\n"):
            record = _parse_line(line)
            if record:
                records.append(record)
        if not records or "run" not in records[0]:  # the first line is damaged: nothing after it can be trusted
            records = [{"run": identity}]
        _check_same_run(records[0]["run"], json.loads(json.dumps(identity)))  # both as JSON has them: lists, no tuples
        for record in records[1:]:
            if record.keys() >= STEP_FIELDS:
                self.steps[record["step"]] = record
        # Without the damaged lines: new ones are appended.
        self.path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """None for a damaged line."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _check_same_run(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    earlier_settings = _flattened(earlier)
    current_settings = _flattened(now)
    for name in earlier_settings | current_settings:
        before = earlier_settings.get(name)
        after = current_settings.get(name)
        if before != after:
            raise RecipeError(
                f"--resume: {name} was {before!r} and is {after!r} now; resume with the same inputs, recipe and version, or "
                f"start again in an empty folder"
            )


def _flattened(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their names, joined with spaces: ``{"recipe": {"seed": 3}}`` → ``{"recipe seed": 3}``."""
    if not isinstance(value, dict):
        return {name: value}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        result |= _flattened(inner, f"{name} {key}".strip())
    return result
