"""One folder and a patch → the other folder, byte for byte.

Every file that the patch refers to is hashed first, so that a wrong folder is named before any work. The written bytes are
hashed as well, and no file gets its final name before all of them have the right SHA-256.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qmerge import hub
from qmerge.checkpoint.at_once import all_or_nothing, check_new
from qmerge.checkpoint.folder import check_room
from qmerge.errors import CheckpointError
from qmerge.patch import codec
from qmerge.patch.file import Patch, hash_of, read_patch
from qmerge.patch.folders import byte_span
from qmerge.patch.manifest import PatchFile, Segment, Side
from qmerge.progress import NoProgress, Progress
from qmerge.safetensors_io.disk import PARTIAL, fsync_folder, open_for_writing
from qmerge.safetensors_io.reader import Reader

LAST = "config.json"
"""The file of the result that gets its name last: a folder without it does not load."""


@dataclass(frozen=True)
class Restored:
    """The written folder: number of files and their bytes."""

    out: Path
    files: int
    nbytes: int
    seconds: float


def apply_patch(
    base: str | Path, patch: Path, out: Path, *, revision: str | None = None, progress: Progress | None = None
) -> Restored:
    """Restore the merged folder from its base and the patch.

    Args:
        base: folder or Hub id.
        out: the folder to write; new or empty.
        revision: of the base on the Hub.

    Raises:
        CheckpointError: the patch is damaged, or it was made for another base.
        RecipeError: ``out`` cannot be used.
        RoomError: not enough disk space. Nothing is left behind by any error.
    """
    opened = read_patch(patch)
    restoration = Restoration(
        patch=opened,
        source=opened.manifest.base,
        result=opened.manifest.merged,
        folder=hub.resolve(str(base), revision, CheckpointError).folder,
        role="BASE",
        change=codec.add_difference,
        progress=progress or NoProgress(),
    )
    return restoration.write_to(out)


def unmerge(
    merged: str | Path, patch: Path, out: Path, *, revision: str | None = None, progress: Progress | None = None
) -> Restored:
    """Restore the files of the base from the merged folder and the patch. Arguments and errors as for ``apply_patch``.

    Raises:
        CheckpointError: also for a patch that was made for one direction only.
    """
    opened = read_patch(patch)
    if not opened.manifest.reversible:
        raise CheckpointError(
            f"{patch.name} was made one way: it does not contain the replaced data of the base {opened.manifest.base.name}; "
            f"make it again without --one-way"
        )
    restoration = Restoration(
        patch=opened,
        source=opened.manifest.merged,
        result=opened.manifest.base,
        folder=hub.resolve(str(merged), revision, CheckpointError).folder,
        role="the merged model",
        change=codec.subtract_difference,
        progress=progress or NoProgress(),
    )
    return restoration.write_to(out)


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """One run.

    ``source``  the side of the patch that the user has, in ``folder``; ``role`` is its name in messages
    ``result``  the side that is written
    ``change``  adds or subtracts a difference: (bytes of the source, difference, width of the numbers) → bytes of the result
    """

    patch: Patch
    source: Side
    result: Side
    folder: Path
    role: str
    change: Callable[[bytearray, bytes, int], bytes]
    progress: Progress

    def write_to(self, out: Path) -> Restored:
        """Check the source, then write every file of the result."""
        started = time.monotonic()
        names = [file.path for file in self.result.files]
        check_new(out, {self.role: self.folder}, names, LAST)
        check_room(out, self.result.nbytes)
        try:
            self.check_source()
            self.progress.stage("writing", self.result.nbytes)
            with all_or_nothing(out, names):
                self.write_files(out)
        finally:
            self.progress.end()
        return Restored(out, len(self.result.files), self.result.nbytes, time.monotonic() - started)

    def check_source(self) -> None:
        """Check that every needed file of the source has the size and SHA-256 that it had.

        Raises:
            CheckpointError: which file differs.
        """
        needed = self.needed_files()
        for file in needed:  # sizes first: they find most wrong folders at once
            path = self.folder / file.path
            if not path.is_file():
                raise CheckpointError(f"{self.folder} has no {file.path}: {self._expected(file)}")
            if path.stat().st_size != file.bytes:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes: {self._expected(file)}")
        self.progress.stage("hashing", sum(file.bytes for file in needed))
        for file in needed:
            sha256 = hash_of(self.folder / file.path)
            if sha256 != file.sha256:
                raise CheckpointError(f"{self.folder / file.path} has SHA-256 {sha256}: {self._expected(file)}")
            self.progress.advance(file.bytes, file.path)

    def needed_files(self) -> list[PatchFile]:
        """The files of the source that segments refer to."""
        positions: set[int] = set()
        for file in self.result.files:
            positions.update(segment.file for segment in file.segments if segment.needs_folder)
        return [self.source.files[position] for position in sorted(positions)]

    def _expected(self, file: PatchFile) -> str:
        return (
            f"expected {file.bytes} bytes with SHA-256 {file.sha256}, as in {self.source.name} when the patch was made; "
            f"use {self.role} in that version"
        )

    def write_files(self, out: Path) -> None:
        """Write all files under temporary names, then rename them."""
        partials: dict[Path, Path] = {}
        with Reader() as reader:
            for file in self.result.files:
                path = out / file.path
                path.parent.mkdir(parents=True, exist_ok=True)
                partials[path] = path.with_name(path.name + PARTIAL)
                self.write_file(file, partials[path], reader)
        # Without its config.json, a folder does not load.
        for path in sorted(partials, key=lambda path: path == out / LAST):
            partials[path].replace(path)
        # Renames survive a power cut only if their folders are synced.
        for folder in {out, *(parent for path in partials for parent in path.parents if out in parent.parents)}:
            fsync_folder(folder)

    def write_file(self, file: PatchFile, path: Path, reader: Reader) -> None:
        """Write one file of the result to a new ``path``.

        Raises:
            CheckpointError: the written bytes have another SHA-256.
        """
        digest = hashlib.sha256()
        with os.fdopen(open_for_writing(path), "wb") as out:
            for segment in file.segments:
                # Written while it is read: a file of any size needs one block of memory.
                for data in self.segment_bytes(segment, reader):
                    out.write(data)
                    digest.update(data)
                    self.progress.advance(len(data), file.path)
            out.flush()
            os.fsync(out.fileno())
        if digest.hexdigest() != file.sha256:
            raise CheckpointError(
                f"{file.path}: the restored file has SHA-256 {digest.hexdigest()}, expected {file.sha256}: {self.folder} was "
                f"changed during the run, or {self.patch.path.name} is corrupted; nothing was kept"
            )

    def segment_bytes(self, segment: Segment, reader: Reader) -> Iterator[bytes | bytearray]:
        """The bytes of a segment of the result, in blocks of at most ``codec.BLOCK``."""
        if segment.how == "whole":
            for data, _ in self.patch.blocks(segment.blob, segment.bytes, reader):
                yield data
        elif segment.how == "copy":
            yield from self._source_blocks(segment, reader)
        else:
            # strict: both must end together, which also makes ``blocks`` check that its blob has no more bytes.
            differences = self.patch.blocks(segment.blob, segment.bytes, reader)
            for source, (difference, width) in zip(self._source_blocks(segment, reader), differences, strict=True):
                yield self.change(source, difference, width)

    def _source_blocks(self, segment: Segment, reader: Reader) -> Iterator[bytearray]:
        path = self.folder / self.source.files[segment.file].path
        span = byte_span(path, segment.offset, segment.bytes, name=path.name)
        for start in range(0, segment.bytes, codec.BLOCK):
            yield reader.bytes(span, start, min(start + codec.BLOCK, segment.bytes))
