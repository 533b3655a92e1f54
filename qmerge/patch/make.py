"""Two finished folders → one patch.

Stages: look at both folders, hash their files, compare them section by section (``compare.py``), write the file (``file.py``).
The layout of a folder needs no special care: headers are bytes like all others.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from qmerge.patch.compare import BlobSpool, FolderComparison
from qmerge.patch.file import write_patch
from qmerge.patch.folders import FolderState, all_files, check_file, model_files
from qmerge.patch.manifest import Manifest
from qmerge.progress import NoProgress, Progress
from qmerge.safetensors_io.disk import disk_errors
from qmerge.safetensors_io.reader import Reader


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The written patch; sizes in bytes.

    ``equal``, ``changed``, ``replaced`` count tensors of the merged model: the base has them; they differ; they have another
    dtype or shape, or the base has none of that name. ``delta_bytes``, ``merged_bytes`` and ``base_bytes`` are parts of
    ``nbytes``: differences, which serve both directions; data of the merged folder; data of the base, for ``unmerge`` only.
    """

    file: Path
    nbytes: int
    merged_size: int
    equal: int
    changed: int
    replaced: int
    delta_bytes: int
    merged_bytes: int
    base_bytes: int
    reversible: bool
    seconds: float

    def lines(self) -> list[str]:
        """Three lines for a terminal."""
        share = self.nbytes / max(1, self.merged_size)
        direction = "one way: apply works, unmerge does not"
        if self.reversible:
            direction = f"{self.base_bytes / 1e6:.2f} MB of it only for unmerge"
        changed = f"{self.changed} changed ({self.delta_bytes / 1e6:.2f} MB)"
        return [
            f"Patch {self.file}: {self.nbytes / 1e6:.2f} MB, {100 * share:.1f} % of the merged folder ({direction})",
            f"Tensors: {self.equal} equal, {changed}, {self.replaced} replaced",
            f"Stored whole, files included: {self.merged_bytes / 1e6:.2f} MB",
        ]


def make_patch(
    base: Path,
    merged: Path,
    file: Path,
    *,
    reversible: bool = True,
    base_name: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the difference between the folders ``base`` and ``merged`` to ``file``.

    Args:
        base: a model's folder; weights in forms that qmerge does not read are left out.
        merged: a finished folder; every file counts.
        reversible: also store the data that only ``unmerge`` needs.
        base_name: the name of the base in messages (its Hub id); default: the name of its folder.

    Raises:
        CheckpointError: a folder is unfinished, damaged, changed during the run, or has a file that cannot be stored.
        RecipeError: ``file`` exists, or is inside one of the folders.
        RoomError, DiskError: not enough disk space, or the disk cannot be written. Nothing is left behind by any error.
    """
    started = time.monotonic()
    progress = progress or NoProgress()
    check_file(file, {"the base": base, "the merged model": merged})
    base_folder = FolderState(base, model_files(base))
    merged_folder = FolderState(merged, all_files(merged))
    try:
        progress.stage("hashing both folders", base_folder.nbytes + merged_folder.nbytes)
        manifest = Manifest(
            made_by=f"qmerge {version('qmerge')}",
            reversible=reversible,
            base=base_folder.hash_files(base_name or base.resolve().name, progress),
            merged=merged_folder.hash_files(merged.resolve().name, progress),
        )
        # The data waits next to the patch: a temporary folder of the system may be in memory.
        folder = file.absolute().parent
        with disk_errors(folder), tempfile.TemporaryFile(dir=folder) as data, Reader() as reader:
            spool = BlobSpool(data, reader)
            comparison = FolderComparison(base_folder, merged_folder, manifest, spool)
            comparison.run(progress)
            nbytes = write_patch(file, manifest, spool.sizes, data)
    finally:
        progress.end()
    return Summary(
        file=file,
        nbytes=nbytes,
        merged_size=manifest.merged.nbytes,
        equal=comparison.equal,
        changed=comparison.changed,
        replaced=comparison.replaced,
        delta_bytes=spool.bytes_of("delta/"),
        merged_bytes=spool.bytes_of("merged/"),
        base_bytes=spool.bytes_of("base/"),
        reversible=reversible,
        seconds=time.monotonic() - started,
    )
