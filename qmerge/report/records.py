"""What was read, for qmerge.json: the SHA-256 of every file that the result depends on, and the models' fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TypeAlias

from qmerge import hub
from qmerge.adapters.reading.folder import CONFIG, tensors_file
from qmerge.checkpoint.fingerprint import fingerprint
from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError
from qmerge.gguf.base import unnamed
from qmerge.planning.inputs import Inputs
from qmerge.progress import Progress
from qmerge.safetensors_io.disk import hash_file
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import FileRecord, FingerprintRecord, InputRecord
from qmerge.weights.parallel import cpu_threads

Share = Callable[[Mapping[Path, int]], Collection[Path]]
"""Which of the models' weight files to hash, of path → bytes."""


def every_file(sizes: Mapping[Path, int]) -> Collection[Path]:
    """All of them."""
    return sizes.keys()


@dataclass(frozen=True)
class _InputFiles:
    """One input and the files of it that a result depends on."""

    role: str
    source: hub.Source
    files: list[Path]

    def without(self, left_out: Collection[Path]) -> _InputFiles:
        return _InputFiles(self.role, self.source, [path for path in self.files if path not in left_out])

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def input_records(inputs: Inputs, progress: Progress, share: Share = every_file) -> list[InputRecord]:
    """Base, adapters and original, in this order, with the hashes of their files.

    Args:
        share: chooses among the weight files of base and original, where several processes share the hashing of these.
            (All of them record the smaller files.)
    """
    sizes = {path: path.stat().st_size for path in weight_files(inputs)}
    left_out = sizes.keys() - share(sizes)
    all_files = [files.without(left_out) for files in _files_of(inputs)]
    progress.stage("hashing inputs", sum(files.nbytes for files in all_files))
    with ThreadPoolExecutor(cpu_threads()) as pool:  # hashing and reading release Python's lock
        return [_input_record(files, pool, progress) for files in all_files]


FileState: TypeAlias = tuple[int, ...]
"""Device, number, size and times of a file: they change when its content does."""


def input_states(inputs: Inputs) -> dict[Path, FileState]:
    """The state of every file that a result depends on, before it is read."""
    return {path: _state(path) for files in _files_of(inputs) for path in files.files}


def check_unchanged(inputs: Inputs, before: Mapping[Path, FileState], records: Sequence[InputRecord]) -> None:
    """Check that no input has changed since it was hashed.

    A file with another state is hashed again: one that was only touched is no problem.

    Raises:
        CheckpointError: a file was changed or removed: what was read of it is not what its hash says.
    """
    for files, record in zip(_files_of(inputs), records, strict=True):
        hash_of = {file.file: file.sha256 for file in record.files}
        for path in files.files:
            try:
                if _state(path) == before[path] or hash_file(path) == hash_of.get(path.name):
                    continue
                problem = "was changed"
            except OSError as cause:
                problem = f"cannot be read any more ({cause.strerror})"
            raise CheckpointError(
                f"{path} {problem} while the run was reading it: the result would be a mixture. Start again when nothing else "
                f"writes to the {files.role}"
            )


def changed_inputs(inputs: Inputs, records: Sequence[InputRecord], *, hashed: bool) -> list[str]:
    """The files of the inputs that are not those of a report, each with the role of its input.

    Args:
        records: ``inputs`` of a report.
        hashed: compare SHA-256, too; else only names and sizes.
    """
    changed = []
    for files, record in zip_longest(_files_of(inputs), records):
        if files is None or record is None:
            return [f"{len(records)} inputs were merged, but {len(_files_of(inputs))} are at hand"]
        recorded = {file.file: file for file in record.files}
        for path in files.files:
            file = recorded.get(path.name)
            same = file is not None and file.bytes == path.stat().st_size
            if not same or (hashed and file is not None and hash_file(path) != file.sha256):
                changed.append(f"{path} ({files.role})")
    return changed


def _state(path: Path) -> FileState:
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def joined_records(inputs: Inputs, parts: Sequence[Sequence[InputRecord]]) -> list[InputRecord]:
    """The records of all inputs, from those of processes that shared the hashing.

    Args:
        parts: what ``input_records`` gave to each of them.

    Raises:
        RecipeError: two of them read different inputs.
    """
    joined = []
    for files, records in zip(_files_of(inputs), zip(*parts, strict=True), strict=True):
        first = records[0]
        found: dict[str, FileRecord] = {}
        for record in records:
            if (record.commit, record.fingerprint) != (first.commit, first.fingerprint):
                raise RecipeError(f"the parts read different models as the {first.role} ({first.name}); {_START_AGAIN}")
            for file in record.files:
                if found.setdefault(file.file, file) != file:
                    raise RecipeError(f"the parts read different files {file.file} of the {first.role}; {_START_AGAIN}")
        in_order = [found[path.name] for path in files.files]
        joined.append(first.model_copy(update={"files": in_order}))
    return joined


_START_AGAIN = "start again in an empty folder, with the same inputs for all parts"


def weight_files(inputs: Inputs) -> list[Path]:
    """The files with weights of the base, and of the original where there is one."""
    files = list(inputs.base.files)
    if inputs.original:
        files += inputs.original.files
    return files


def _files_of(inputs: Inputs) -> list[_InputFiles]:
    base_files = [*inputs.base.files, inputs.base.folder / "config.json"]
    all_files = [_InputFiles("base", inputs.base_source, base_files)]
    for source in inputs.adapter_sources:
        all_files.append(_InputFiles("adapter", source, [tensors_file(source.folder), source.folder / CONFIG]))
    if inputs.original and inputs.original_source:
        all_files.append(_InputFiles("original", inputs.original_source, list(inputs.original.files)))
    return all_files


def _input_record(files: _InputFiles, pool: ThreadPoolExecutor, progress: Progress) -> InputRecord:
    source = files.source
    records = []
    for record in pool.map(_file_record, files.files):
        progress.advance(record.bytes, record.file)
        records.append(record)
    return InputRecord(
        role=files.role,
        name=source.name,
        id=source.id,
        commit=source.commit,
        files=records,
        # An adapter's files are few: their hashes say enough.
        fingerprint=None if files.role == "adapter" else fingerprint_record(source.folder, source.file),
    )


def _file_record(path: Path) -> FileRecord:
    return FileRecord(file=path.name, bytes=path.stat().st_size, sha256=hash_file(path))


def fingerprint_record(folder: Path, file: Path | None = None) -> FingerprintRecord:
    """The fingerprint of a model folder, or of a GGUF file, as it is on disk, whatever a run makes of it (replicated layers)."""
    with Reader() as reader:
        found = fingerprint(unnamed(file) if file else scan(folder, reader), reader)
    return FingerprintRecord(id=found.id, tensors=found.tensors, values=found.values, config=found.config)
