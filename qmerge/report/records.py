"""What was read, for qmerge.json: SHA-256 of every file that the result depends on, and which model the base is."""

from __future__ import annotations

from pathlib import Path

from qmerge import hub
from qmerge.adapters.reading.folder import CONFIG, TENSORS
from qmerge.checkpoint.fingerprint import fingerprint
from qmerge.checkpoint.scan import scan
from qmerge.planning.inputs import Inputs
from qmerge.progress import Progress
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import hash_file
from qmerge.schema import FileRecord, FingerprintRecord, InputRecord


def input_records(inputs: Inputs, progress: Progress) -> list[InputRecord]:
    """Base, adapters and original, in this order."""
    base_files = [*inputs.base.files, inputs.base.folder / "config.json"]
    roles: list[tuple[str, hub.Source, bool, list[Path]]] = [("base", inputs.base_source, True, base_files)]
    for source in inputs.adapter_sources:
        roles.append(("adapter", source, False, [source.folder / TENSORS, source.folder / CONFIG]))
    if inputs.original and inputs.original_source:
        roles.append(("original", inputs.original_source, True, list(inputs.original.files)))
    progress.stage("hashing inputs", sum(path.stat().st_size for *_, files in roles for path in files))
    return [
        InputRecord(
            role=role,
            name=source.name,
            id=source.id,
            commit=source.commit,
            files=[file_record(path, progress) for path in files],
            fingerprint=fingerprint_record(source.folder) if is_model else None,
        )
        for role, source, is_model, files in roles
    ]


def file_record(path: Path, progress: Progress) -> FileRecord:
    size = path.stat().st_size
    record = FileRecord(file=path.name, bytes=size, sha256=hash_file(path))
    progress.advance(size, path.name)
    return record


def fingerprint_record(folder: Path) -> FingerprintRecord:
    """Of what lies there, whatever a run makes of it (replicated layers)."""
    with Reader() as reader:
        found = fingerprint(scan(folder, reader), reader)
    return FingerprintRecord(id=found.id, tensors=found.tensors, values=found.values, config=found.config)
