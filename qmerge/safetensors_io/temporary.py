"""Temporary folders that nothing leaves behind: no signal, whenever it comes, and no killed run, once the next one begins.

``tempfile.TemporaryDirectory`` leaves its folder where a signal comes while it is made or removed, and after SIGKILL.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import os
import platform
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from qmerge.safetensors_io.disk import disk_errors

PREFIX = f"qmerge-{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}-"
"""Also of this machine: several may share the folder, and locks of one may mean nothing to the others (NFS, Lustre)."""

NAME = re.compile(rf"{PREFIX}[0-9a-f]{{32}}")


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Inside, a new folder in the system's folder for temporary files (``TMPDIR``).

    Raises:
        RoomError, DiskError: it cannot be made. (Where it cannot be removed, nothing is raised: the work is done.)
    """
    # The name is known before the folder exists, so that it is removed even if a signal comes while it is made.
    folder = _new_path()
    lock: list[int] = []
    try:
        _make(folder, lock)
        yield folder
    finally:
        try:
            shutil.rmtree(folder, ignore_errors=True)
        finally:  # once more, where a signal has interrupted that
            shutil.rmtree(folder, ignore_errors=True)
            for descriptor in lock:
                os.close(descriptor)


def folder_until_exit() -> Path:
    """A new folder that is removed when the process ends.

    Raises:
        RoomError, DiskError: it cannot be made.
    """
    parent = _folder_of_process()
    with disk_errors(parent):
        return Path(tempfile.mkdtemp(dir=parent))


@cache
def _folder_of_process() -> Path:
    folder = _new_path()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _make(folder, [])
    return folder


def remove_left_folders() -> None:
    """Remove what killed runs of this user have left on this machine: the folders that no process has locked."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if not NAME.fullmatch(path.name):
            continue
        with suppress(OSError):  # removed meanwhile, another user's, or in use
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == os.geteuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)
            finally:
                os.close(descriptor)


def _new_path() -> Path:
    return Path(tempfile.gettempdir()) / f"{PREFIX}{secrets.token_hex(16)}"


def _make(folder: Path, lock: list[int]) -> None:
    """Make the folder, and lock it as long as this process lives, or until the descriptor that is added to ``lock`` is closed."""
    remove_left_folders()
    with disk_errors(folder.parent):
        made = False
        while not made:
            # Before it is locked, another run may take it for one that is left, and remove it.
            with suppress(FileNotFoundError):
                folder.mkdir(mode=0o700, exist_ok=True)
                lock.append(os.open(folder, os.O_RDONLY | os.O_DIRECTORY))
                with suppress(OSError):  # some network file systems have no locks; there, nothing is removed either
                    fcntl.flock(lock[-1], fcntl.LOCK_EX)
                made = folder.stat().st_ino == os.fstat(lock[-1]).st_ino
