"""What was read, for qmerge.json: the SHA-256 of every file that the result depends on, and the models' fingerprints."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class _InputFiles:
    """One input and the files of it that a result depends on."""

    role: str
    source: hub.Source
    files: list[Path]

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def input_records(inputs: Inputs, progress: Progress) -> list[InputRecord]:
    """Base, adapters and original, in this order, with the hashes of their files."""
    all_files = _files_of(inputs)
    progress.stage("hashing inputs", sum(files.nbytes for files in all_files))
    return [_input_record(files, progress) for files in all_files]


def _files_of(inputs: Inputs) -> list[_InputFiles]:
    base_files = [*inputs.base.files, inputs.base.folder / "config.json"]
    all_files = [_InputFiles("base", inputs.base_source, base_files)]
    for source in inputs.adapter_sources:
        all_files.append(_InputFiles("adapter", source, [source.folder / TENSORS, source.folder / CONFIG]))
    if inputs.original and inputs.original_source:
        all_files.append(_InputFiles("original", inputs.original_source, list(inputs.original.files)))
    return all_files


def _input_record(files: _InputFiles, progress: Progress) -> InputRecord:
    source = files.source
    return InputRecord(
        role=files.role,
        name=source.name,
        id=source.id,
        commit=source.commit,
        files=[_file_record(path, progress) for path in files.files],
        # An adapter's files are few: their hashes say enough.
        fingerprint=None if files.role == "adapter" else fingerprint_record(source.folder),
    )


def _file_record(path: Path, progress: Progress) -> FileRecord:
    size = path.stat().st_size
    record = FileRecord(file=path.name, bytes=size, sha256=hash_file(path))
    progress.advance(size, path.name)
    return record


def fingerprint_record(folder: Path) -> FingerprintRecord:
    """The fingerprint of a model folder as it is on disk, whatever a run makes of it (replicated layers)."""
    with Reader() as reader:
        found = fingerprint(scan(folder, reader), reader)
    return FingerprintRecord(id=found.id, tensors=found.tensors, values=found.values, config=found.config)
