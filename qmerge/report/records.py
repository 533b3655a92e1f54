"""What was read, for qmerge.json: SHA-256 of every file that the result depends on, and which model the base is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qmerge import hub
from qmerge.adapters._folder import CONFIG, TENSORS
from qmerge.checkpoint.fingerprint import fingerprint
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.scan import scan
from qmerge.checkpoint.writer import hash_file
from qmerge.inputs import Inputs
from qmerge.report.json import FileRecord, FingerprintRecord, InputRecord

if TYPE_CHECKING:
    from qmerge.run import Watcher


def input_records(inputs: Inputs, watcher: Watcher) -> list[InputRecord]:
    """Base, adapters and original, in this order."""
    base_files = [*inputs.base.files, inputs.base.folder / "config.json"]
    roles: list[tuple[str, hub.Source, bool, list[Path]]] = [("base", inputs.base_source, True, base_files)]
    for source in inputs.adapter_sources:
        roles.append(("adapter", source, False, [source.folder / TENSORS, source.folder / CONFIG]))
    if inputs.original and inputs.original_source:
        roles.append(("original", inputs.original_source, True, list(inputs.original.files)))
    watcher.stage("hashing inputs", sum(path.stat().st_size for *_, files in roles for path in files))
    return [
        InputRecord(
            role=role,
            name=source.name,
            id=source.id,
            commit=source.commit,
            files=[file_record(path, watcher) for path in files],
            fingerprint=fingerprint_record(source.folder) if is_model else None,
        )
        for role, source, is_model, files in roles
    ]


def file_record(path: Path, watcher: Watcher) -> FileRecord:
    size = path.stat().st_size
    record = FileRecord(file=path.name, bytes=size, sha256=hash_file(path))
    watcher.advance(size, path.name)
    return record


def fingerprint_record(folder: Path) -> FingerprintRecord:
    """Of what lies there, whatever a run makes of it (replicated layers)."""
    with Reader() as reader:
        found = fingerprint(scan(folder, reader), reader)
    return FingerprintRecord(id=found.id, tensors=found.tensors, values=found.values, config=found.config)
