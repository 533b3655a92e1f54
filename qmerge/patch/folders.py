"""The two folders that a patch is made of: which files belong to them, and the sections of each file."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from qmerge import hub
from qmerge.checkpoint import journal
from qmerge.checkpoint.folder import LOCK, TOOLS_FOLDERS
from qmerge.errors import CheckpointError, RecipeError
from qmerge.patch.file import hash_of
from qmerge.patch.manifest import PatchFile, Side, path_problems
from qmerge.progress import Progress
from qmerge.safetensors_io.disk import PARTIAL
from qmerge.safetensors_io.header import read_header
from qmerge.types import TensorInfo

HEADER = ""
"""The name of the section that is not a tensor: a safetensors header with its 8 length bytes, or a whole other file."""

OTHER_WEIGHTS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx"]


def check_file(file: Path, folders: dict[str, Path]) -> None:
    """Check that a new patch can be written to ``file``; ``folders``: role in messages → folder that it must not be in.

    Raises:
        RecipeError: the file exists, its folder does not, or it is inside one of the folders.
        CheckpointError: one of the folders is missing.
    """
    if file.exists() or file.is_symlink():
        raise RecipeError(f"{file} exists: delete it or choose another name")
    if not file.absolute().parent.is_dir():
        raise RecipeError(f"{file}: the folder {file.parent} does not exist; make it first")
    for role, folder in folders.items():
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: expected {role}")
        if file.resolve().is_relative_to(folder.resolve()):
            raise RecipeError(f"{file} is inside {role} ({folder}); write it to another folder")


def all_files(folder: Path) -> list[str]:
    """Every file below a folder (relative, sorted), without those that git and the Hub library keep about it.

    Raises:
        CheckpointError: the run that wrote the folder is not finished, a file name cannot be stored, or a link leads out
            of the folder.
    """
    names = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        is_tools = set(name.split("/")) & set(TOOLS_FOLDERS)
        if name != LOCK and not is_tools:
            names.append(name)
    for name in names:
        if name == journal.NAME or name.endswith(PARTIAL):
            raise CheckpointError(f"{folder} is not finished (it has {name}): finish the run with --resume")
    # The same rules as for the names in a patch: qmerge must be able to read every patch that it writes.
    problem = next(path_problems(names), None)
    if problem:
        raise CheckpointError(f"{folder}: {problem}: rename the file")
    allowed_parents = (folder.resolve(), hub.cache_folder())
    for name in names:
        target = (folder / name).resolve()
        if target.is_dir():
            raise CheckpointError(f"{folder}: {name} is a link to a folder; replace it with the folder")
        # Weights are often linked from another disk. Any other link could put a private file into a patch to be shared.
        is_weight = name.endswith(".safetensors")
        if not is_weight and not any(target.is_relative_to(parent) for parent in allowed_parents):
            raise CheckpointError(f"{folder}: {name} is a link that leads out of the folder; replace it with the file")
    return names


def model_files(folder: Path) -> list[str]:
    """``all_files`` of a base, without weights that qmerge does not read: they would be stored whole."""
    return [name for name in all_files(folder) if not matches(name, [*hub.UNUSED_FILES, *OTHER_WEIGHTS])]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns fits a file name, as in the Hub library."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def byte_span(path: Path, offset: int, nbytes: int, name: str = HEADER) -> TensorInfo:
    """Some bytes of a file, as a section that is not a tensor; ``name`` is its name in read errors."""
    return TensorInfo(dtype="U8", shape=(nbytes,), name=name, file=path, offset=offset)


class FolderState:
    """The files of a folder as they were at first sight.

    Raises:
        CheckpointError: no safetensors file, or a file cannot be read.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        self.path = path
        self.names = names
        self._stats = [self._stat(name) for name in names]
        if not any(name.endswith(".safetensors") for name in names):
            raise CheckpointError(f"{path} has no safetensors file: expected a model")

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for size, _ in self._stats)

    def hash_files(self, name: str, progress: Progress) -> Side:
        """Every file with its size and SHA-256, without segments; ``name`` is the name of the folder in messages."""
        files = []
        for path, (size, _) in zip(self.names, self._stats, strict=True):
            files.append(PatchFile(path=path, bytes=size, sha256=hash_of(self.path / path)))
            progress.advance(size, path)
        return Side(name=name, files=files)

    def sections(self, file: PatchFile) -> list[TensorInfo]:
        """The parts of a file that are compared, in order: header and tensors, or the whole file as one; no empty ones.

        Raises:
            CheckpointError: a safetensors file has an invalid header.
        """
        path = self.path / file.path
        if not file.path.endswith(".safetensors"):
            return [byte_span(path, 0, file.bytes)] if file.bytes else []
        tensors, _ = read_header(path, CheckpointError)
        ordered = sorted((tensor for tensor in tensors.values() if tensor.nbytes), key=lambda tensor: tensor.offset)
        # read_header checks that the tensors cover the rest of the file without holes.
        header_bytes = file.bytes - sum(tensor.nbytes for tensor in ordered)
        return [byte_span(path, 0, header_bytes), *ordered]

    def check_unchanged(self) -> None:
        """Raise CheckpointError where a file has another size or time than at first sight."""
        for name, stat in zip(self.names, self._stats, strict=True):
            if self._stat(name) != stat:
                raise CheckpointError(f"{self.path / name} was changed while it was read; try again")

    def _stat(self, name: str) -> tuple[int, int]:
        """Size in bytes and time of the last change in nanoseconds."""
        try:
            stat = (self.path / name).stat()
        except OSError as cause:
            raise CheckpointError(f"{self.path / name}: cannot be read: {cause.strerror}") from cause
        return stat.st_size, stat.st_mtime_ns
