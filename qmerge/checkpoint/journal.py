"""The journal of a run, in the output folder, from which ``--resume`` continues.

    first line           identity of the run: version, recipe, SHA-256 of every input; of a part of a run, also what
                         ``qmerge finalize`` needs to know of it
    a line per step      when it is done: SHA-256 of the tensors that it wrote, and its measurements
    a line per file      when it is whole: size and SHA-256

Every line ends with a checksum of itself: a damaged line is as good as none. A resumed run does not trust the lines either: it
hashes the bytes that are on the disk. Of a run in parts, every part has a journal of its own.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qmerge.checkpoint.parts import Part, name_of_part, part_of_name
from qmerge.errors import RecipeError
from qmerge.safetensors_io.disk import disk_errors, write_file

STEM = ".qmerge-journal"
NAME = f"{STEM}.jsonl"

# Fields and their types; a line without one of them, or with another type, is as good as none.
STEP_TYPES = {"step": str, "sha256": dict, "texts": dict, "outcome": object}
FILE_TYPES = {"file": str, "bytes": int, "sha256": str}
PART_TYPES = {"recipe": dict, "files": list, "records": list, "device": str}

CHECKSUM = "line_sha256"
"""Key of a line's checksum: SHA-256 of the line without it."""


class Journal:
    """Lines of JSON that are only appended. Threads may share one.

    Args:
        identity: settings and inputs; a run can only be resumed with equal ones.
        resume: continue the journal of an earlier run, if there is one.
        part: which part of a run this is; None for a whole one.
        part_facts: what ``qmerge finalize`` needs to know of the part.

    Attributes:
        steps: name of a step → its record, of the earlier run.
        files: name of a file → its record, of this run.

    Raises:
        RecipeError: the earlier run has another identity.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict[str, Any],
        resume: bool,
        part: Part | None = None,
        part_facts: dict[str, Any] | None = None,
    ) -> None:
        self.path = folder / name_of_part(NAME, part)
        self.steps: dict[str, dict[str, Any]] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self._lock = threading.Lock()
        if resume and self.path.exists():
            self._load(identity, part_facts)
        else:
            write_file(self.path, _encoded(_first_line(identity, part_facts)))

    def step_done(self, name: str, record: dict[str, Any]) -> None:
        """Record a finished step: ``sha256`` of its tensors, their ``texts``, its ``outcome``."""
        self._append({"step": name, **record})

    def file_done(self, name: str, record: dict[str, Any]) -> None:
        """Record a finished file, and sync: it gets its final name after this."""
        self.files[name] = record
        self._append({"file": name, **record}, sync=True)

    def remove(self) -> None:
        """Delete the journal: the output folder is finished."""
        with disk_errors(self.path.parent):
            self.path.unlink()

    def _append(self, line: dict[str, Any], sync: bool = False) -> None:
        data = _encoded(line)
        with self._lock, disk_errors(self.path.parent):
            # A link is an error. One write per line: after a kill, only the last one can be incomplete.
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                written = os.write(descriptor, data)
                if written < len(data):  # the disk is full: a line of its own after the damaged one
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                if sync:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _load(self, identity: dict[str, Any], part_facts: dict[str, Any] | None) -> None:
        """Take over the lines that are whole.

        A kill or a power cut may have damaged any line. Its step is then done again, which costs time, but no bytes.
        """
        content = read_journal(self.path)
        # Where the first line is damaged, nothing after it can be trusted: the journal is empty.
        if content.first:
            difference = first_difference(content.first["run"], identity)
            if difference:
                raise RecipeError(
                    f"--resume: {difference} now; resume with the same inputs, recipe and version, or start again in an empty "
                    f"folder"
                )
        self.steps = content.steps
        # Without the damaged lines: new ones are appended.
        lines = [_first_line(identity, part_facts), *content.steps.values()]
        write_file(self.path, b"".join(map(_encoded, lines)))


def _first_line(identity: dict[str, Any], part_facts: dict[str, Any] | None) -> dict[str, Any]:
    if part_facts is None:
        return {"run": identity}
    return {"run": identity, "part": part_facts}


@dataclass
class JournalContent:
    """The whole lines of a journal.

    first  the first line: ``run`` and, for a part, ``part``; empty where it is damaged
    steps  name of a step → its record
    files  name of a file → its record
    """

    first: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


def read_journal(path: Path) -> JournalContent:
    """Read a journal, without its damaged lines; nothing at all where the first line is damaged."""
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n"):
        record = _parse_line(line)
        if record:
            records.append(record)
    content = JournalContent()
    if not records or not isinstance(records[0].get("run"), dict):
        return content
    part = records[0].get("part")
    if part is not None and not (isinstance(part, dict) and _has_types(part, PART_TYPES)):
        return content
    content.first = records[0]
    for record in records[1:]:
        if _has_types(record, STEP_TYPES):
            content.steps[record["step"]] = record
        if _has_types(record, FILE_TYPES):
            content.files[record["file"]] = record
    return content


def _has_types(record: Mapping[str, Any], types: Mapping[str, type]) -> bool:
    return all(name in record and isinstance(record[name], kind) for name, kind in types.items())


def parts_begun(folder: Path, name: str = NAME) -> list[Part]:
    """The parts that have a journal in a folder; or another file, with this name in a run that is not in parts."""
    found = []
    for path in folder.iterdir():
        part = part_of_name(path.name, name)
        if part:
            found.append(part)
    return sorted(found)


def _encoded(line: dict[str, Any]) -> bytes:
    """A line with its checksum."""
    return (json.dumps({**line, CHECKSUM: _checksum(line)}) + "\n").encode()


def _checksum(line: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(line, sort_keys=True).encode()).hexdigest()


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """None for a damaged line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.pop(CHECKSUM, None) != _checksum(value):
        return None
    return value


def first_difference(earlier: dict[str, Any], now: dict[str, Any]) -> str | None:
    """The first setting that is not the same in two identities, in words: ``recipe seed was 0 and is 3``; None if all are."""
    # Both as JSON has them: lists, no tuples.
    earlier_settings = _flattened(json.loads(json.dumps(earlier)))
    current_settings = _flattened(json.loads(json.dumps(now)))
    for name in earlier_settings | current_settings:
        before = earlier_settings.get(name)
        after = current_settings.get(name)
        if before != after:
            return f"{name} was {before!r} and is {after!r}"
    return None


def _flattened(value: Any, name: str = "") -> dict[str, Any]:
    """Nested settings by their names, joined with spaces: ``{"recipe": {"seed": 3}}`` → ``{"recipe seed": 3}``."""
    if not isinstance(value, dict):
        return {name: value}
    result: dict[str, Any] = {}
    for key, inner in value.items():
        result |= _flattened(inner, f"{name} {key}".strip())
    return result
