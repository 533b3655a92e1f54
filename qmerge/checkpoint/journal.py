"""The journal of a run, in the output folder: what makes ``--resume`` safe.

First line: what this run is (version, recipe, SHA-256 of every input). Then one line per finished step, with the hash
of what it wrote and its measurements, and one per finished file. A resumed run trusts no line: it hashes the bytes.
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


class Journal:
    """Append-only lines of JSON. ``steps``: what an earlier run says it did. ``files``: what this run finished."""

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
        self._append({"step": name, **record})

    def file_done(self, name: str, record: dict[str, Any]) -> None:
        self.files[name] = record
        self._append({"file": name, **record}, sync=True)

    def remove(self) -> None:
        self.path.unlink()

    def _append(self, line: dict[str, Any], sync: bool = False) -> None:
        data = (json.dumps(line) + "\n").encode()
        with self._lock, no_room_is_an_error(self.path.parent), self.path.open("ab") as file:
            file.write(data)
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def _load(self, identity: dict[str, Any]) -> None:
        """Take what is whole: a kill or a power cut may have spoiled any line, which then costs work, but no bytes."""
        records = [record for line in self.path.read_bytes().split(b"\n") if (record := _record(line))]
        if not records or "run" not in records[0]:
            records = [{"run": identity}]
        _check_same(records[0]["run"], json.loads(json.dumps(identity)))
        for record in records[1:]:
            if {"step", "sha256", "texts", "outcome"} <= record.keys():
                self.steps[record["step"]] = record
        self.path.write_text("".join(json.dumps(record) + "\n" for record in records))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _check_same(earlier: dict[str, Any], now: dict[str, Any]) -> None:
    def flat(value: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        return {path: leaf for name, inner in value.items() for path, leaf in flat(inner, f"{prefix} {name}").items()}

    before, after = flat(earlier), flat(now)
    changed = [name.strip() for name in before | after if before.get(name) != after.get(name)]
    if changed:
        first = f" {changed[0]}"
        raise RecipeError(
            f"--resume: {changed[0]} was {before.get(first)!r} and is {after.get(first)!r} now; "
            f"resume with the same inputs, recipe and version, or start again in an empty folder"
        )
