"""A folder and a patch → the other folder, byte for byte.

What the patch refers to is hashed first, so that a wrong folder costs no work and is named; what is written is hashed on
the way, and no file gets its name before all of them are what they were.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qmerge import hub
from qmerge.checkpoint.folder import check_out, check_room, locked
from qmerge.errors import CheckpointError
from qmerge.patch import codec
from qmerge.patch.file import Patch, PatchFile, Segment, Side, hashed, no_room, read_patch
from qmerge.progress import NoProgress, Progress
from qmerge.safetensors_io.header import fsync_folder
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import PARTIAL
from qmerge.types import TensorInfo


@dataclass(frozen=True)
class Restored:
    """What was written; ``nbytes`` of all files."""

    out: Path
    files: int
    nbytes: int
    seconds: float


def apply_patch(
    base: str | Path, patch: Path, out: Path, revision: str | None = None, progress: Progress | None = None
) -> Restored:
    """Base and patch → the merged folder.

    Args:
        base: folder or Hub id.
        out: new or empty.

    Raises:
        CheckpointError: the base is another one, or the patch is damaged.
        RecipeError: ``out`` cannot be used.
        RoomError: no room on the disk. Nothing is left behind by any of these.
    """
    opened = read_patch(patch)
    folder = hub.resolve(str(base), revision, CheckpointError).folder
    manifest = opened.manifest
    return Restoring(opened, manifest.base, manifest.merged, folder, "BASE", +1, progress or NoProgress()).into(out)


def unmerge(
    merged: str | Path, patch: Path, out: Path, revision: str | None = None, progress: Progress | None = None
) -> Restored:
    """Merged folder and patch → the base's files. Arguments and errors as for ``apply_patch``.

    Raises:
        CheckpointError: also where the patch was made for one way only.
    """
    opened = read_patch(patch)
    manifest = opened.manifest
    if not manifest.reversible:
        raise CheckpointError(
            f"{patch.name} was made one way: it does not hold what of the base {manifest.base.name} was replaced; "
            f"make it again without --one-way"
        )
    folder = hub.resolve(str(merged), revision, CheckpointError).folder
    return Restoring(
        opened, manifest.merged, manifest.base, folder, "the merged model", -1, progress or NoProgress()
    ).into(out)


class Restoring:
    """``sign``: +1 where differences are added, −1 where they are taken away."""

    def __init__(
        self, patch: Patch, have: Side, want: Side, folder: Path, role: str, sign: int, progress: Progress
    ) -> None:  # fmt: skip
        self.patch, self.have, self.want, self.folder = patch, have, want, folder
        self.role, self.sign, self.progress = role, sign, progress

    def into(self, out: Path) -> Restored:
        started = time.monotonic()
        check_out(out, {self.role: self.folder}, resume=False)
        check_room(out, self.want.nbytes)
        try:
            self.check_files()
            self.progress.stage("writing", self.want.nbytes)
            existed = out.exists()
            try:
                with locked(out), no_room(out):
                    self.write(out)
            except BaseException:
                if not existed and out.is_dir() and not any(out.iterdir()):
                    out.rmdir()
                raise
        finally:
            self.progress.end()
        return Restored(out, len(self.want.files), self.want.nbytes, time.monotonic() - started)

    def check_files(self) -> None:
        """Every file that a segment refers to has the size and SHA-256 that it had."""
        segments = [segment for file in self.want.files for segment in file.segments]
        needed = [self.have.files[place] for place in sorted({s.file for s in segments if s.how != "whole"})]
        for file in needed:  # sizes first: most wrong folders are found at once
            path = self.folder / file.path
            if not path.is_file():
                raise CheckpointError(f"{self.folder} has no {file.path}: {self._expected(file)}")
            if path.stat().st_size != file.bytes:
                raise CheckpointError(f"{path} has {path.stat().st_size} bytes: {self._expected(file)}")
        self.progress.stage("hashing", sum(file.bytes for file in needed))
        for file in needed:
            found = hashed(self.folder / file.path)
            if found != file.sha256:
                raise CheckpointError(f"{self.folder / file.path} has SHA-256 {found}: {self._expected(file)}")
            self.progress.advance(file.bytes, file.path)

    def _expected(self, file: PatchFile) -> str:
        return (
            f"expected {file.bytes} bytes with SHA-256 {file.sha256}, as in {self.have.name}, for which the patch was made; "
            f"give {self.role} as it was then"
        )

    def write(self, out: Path) -> None:
        """All files under temporary names; then their own, config.json last, without which a folder does not load."""
        partials: dict[Path, Path] = {}
        made: list[Path] = []
        try:
            with Reader() as reader:
                for file in self.want.files:
                    final = out / file.path
                    missing = [p for p in final.parents if p != out and out in p.parents and not p.exists()]
                    for parent in reversed(missing):
                        parent.mkdir()
                        made.append(parent)
                    partial = final.with_name(final.name + PARTIAL)
                    partials[final] = partial
                    self._write_file(file, partial, reader)
            for final in sorted(partials, key=lambda path: path == out / "config.json"):
                partials[final].replace(final)
            for place in {out, *made}:
                fsync_folder(place)
        except BaseException:
            for final, partial in partials.items():
                partial.unlink(missing_ok=True)
                final.unlink(missing_ok=True)
            for place in reversed(made):
                place.rmdir()
            raise

    def _write_file(self, file: PatchFile, path: Path, reader: Reader) -> None:
        digest = hashlib.sha256()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as written:
            for segment in file.segments:
                for data in self._data(segment, reader):
                    written.write(data)
                    digest.update(data)
                    self.progress.advance(len(data), file.path)
            written.flush()
            os.fsync(written.fileno())
        if digest.hexdigest() != file.sha256:
            raise CheckpointError(
                f"{file.path} came out with SHA-256 {digest.hexdigest()}, expected {file.sha256}: {self.folder} was changed "
                f"meanwhile, or {self.patch.path.name} is no sound patch; nothing was kept"
            )

    def _data(self, segment: Segment, reader: Reader) -> Iterator[bytes | bytearray]:
        if segment.how == "whole":
            yield from (data for data, _ in self.patch.blocks(segment.blob, segment.bytes, reader))
            return
        path = self.folder / self.have.files[segment.file].path
        old = TensorInfo("U8", (segment.bytes,), path.name, path, segment.offset)
        changes = self.patch.blocks(segment.blob, segment.bytes, reader) if segment.how == "delta" else None
        for start in range(0, segment.bytes, codec.BLOCK):
            data = reader.bytes(old, start, min(start + codec.BLOCK, segment.bytes))
            yield codec.added(data, *next(changes), self.sign) if changes else data
        if changes:
            next(changes, None)  # its end: nothing may be left over
