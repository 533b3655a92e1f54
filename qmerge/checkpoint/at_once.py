"""Folders that are written at once, without ``--resume``: whole, or nothing of them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from qmerge.checkpoint.folder import LOCK, acquire_lock, check_out, locked, remove_lock
from qmerge.safetensors_io.disk import PARTIAL, disk_errors, remove


def check_new(out: Path, inputs: Mapping[str, Path], files: Collection[str], last: str) -> None:
    """Check that a command may write to an output folder, and remove what a killed run of it has left there.

    Args:
        inputs: as in ``check_out``.
        files: paths in the folder of all files that the command may write.
        last: the one that it writes last.

    Raises:
        RecipeError: another process is writing to the folder, or it is neither new nor empty.
    """
    # The system ends the lock of a killed process, but its file stays.
    if (out / LOCK).exists():
        acquire_lock(out).release()
        with disk_errors(out):
            # With the last file, the folder may be whole.
            if not os.path.lexists(out / last):
                _remove_leftovers(out, files)
        remove_lock(out)
    check_out(out, inputs, resume=False)


def _remove_leftovers(out: Path, files: Collection[str]) -> None:
    """Remove the files in the folder, unless it has one that the command does not write."""
    own = {LOCK, *files, *(f"{name}{PARTIAL}" for name in files)}
    folders = []
    found = []
    for path in out.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            folders.append(path)
        elif path.relative_to(out).as_posix() in own:
            found.append(path)
        else:
            return
    for path in found:
        if path.name != LOCK:  # it is the sign that all this may be removed
            path.unlink()
    # The inner ones first.
    for folder in sorted(folders, reverse=True):
        folder.rmdir()


@contextmanager
def all_or_nothing(out: Path, files: Collection[str]) -> Iterator[None]:
    """Inside, these files are written into the locked folder. After any error, Ctrl-C included, none of them is left, nor the
    folder where it was new.

    Raises:
        RecipeError, RoomError, DiskError: as ``locked``.
    """
    existed = out.exists()
    try:
        with locked(out):
            try:
                yield
            except BaseException:
                _remove_written(out, files)
                raise
    except BaseException:
        # Somebody else may have written to it in the meantime.
        if not existed:
            with suppress(OSError):
                out.rmdir()
        raise


def _remove_written(out: Path, files: Collection[str]) -> None:
    for name in files:
        remove(out / name)
        remove(out / f"{name}{PARTIAL}")
    parents = {parent for name in files for parent in (out / name).parents if out in parent.parents}
    for folder in sorted(parents, reverse=True):
        with suppress(OSError):
            folder.rmdir()
