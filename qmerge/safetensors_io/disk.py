"""Reading and writing files: whole or not at all, without following links, and with errors that say what the disk did."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from qmerge.errors import DiskError, InputError, QmergeError, RecipeError, RoomError, is_out_of_memory, out_of_memory

PARTIAL = ".partial"
"""Added to the name of a file that is not whole."""

HASH_CHUNK = 2**22
"""Bytes that are read at once to be hashed or copied."""

LONGEST_SHOWN = 100
"""Characters that a message shows of a name that is too long."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, an exceeded quota, and the file system's size limit."""

RUN_AGAIN = "run again (a merge: with --resume, which keeps finished work)"


class Hash(Protocol):
    """What ``hashlib`` makes."""

    def update(self, data: bytes, /) -> None:
        """Add bytes."""


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Inside, an error of the operating system is raised as one line: RoomError where there is no room, else DiskError.

    Args:
        folder: which is being written.
    """
    try:
        yield
    except OSError as cause:
        raise disk_error(cause, folder) from cause


def disk_error(cause: OSError, folder: Path | None) -> QmergeError:
    """An error of the operating system in one line."""
    if cause.errno == errno.ENAMETOOLONG:
        return RecipeError(f"{str(cause.filename)[:LONGEST_SHOWN]} …: {cause.strerror}; use a shorter name")
    if is_out_of_memory(cause):  # files are mapped into memory, too
        return out_of_memory(cause)
    if cause.errno in NO_ROOM:
        place = folder or cause.filename or "the disk"
        return RoomError(f"no room left in {place}: {cause.strerror}. Free some space, then {RUN_AGAIN}")
    place = cause.filename or folder or "the disk"
    return DiskError(f"{place}: {cause.strerror or cause}. When the disk can be written again, {RUN_AGAIN}")


def failure_of_machine(cause: BaseException) -> QmergeError | None:
    """An error of memory or disk, wherever it was raised, in one line; None for any other error, which may be a bug."""
    if is_out_of_memory(cause):
        return out_of_memory(cause)
    return disk_error(cause, None) if isinstance(cause, OSError) else None


def reserve(descriptor: int, size: int) -> None:
    """Reserve space on the disk now, so that a full disk is noticed before the work; some file systems only set the size."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as cause:
        if cause.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        # The file system cannot reserve space. A resumed file may be longer already.
        os.ftruncate(descriptor, max(size, os.fstat(descriptor).st_size))


def open_for_writing(path: Path, *, keep: bool = False) -> int:
    """A descriptor of a file to write, also to read it back. No link is followed: nothing outside the folder is overwritten.

    Args:
        keep: go on with a file that exists; else it must not exist.

    Raises:
        OSError: the name is that of a link, or of a file that is not to be kept.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW
    if not (keep and path.exists()):
        flags |= os.O_CREAT | os.O_EXCL
    return os.open(path, flags, 0o666)


def write_range(descriptor: int, start: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of ``data`` from byte ``start`` on."""
    position = start
    view = memoryview(data)
    while len(view):  # a write may take less than it was given
        count = os.pwrite(descriptor, view, position)
        position += count
        view = view[count:]


def read_range(descriptor: int, start: int, length: int) -> bytes:
    """``length`` bytes of a file from ``start`` on; fewer, where the file ends before."""
    data = b""
    while len(data) < length:  # a read may return less than was asked for
        more = os.pread(descriptor, length - len(data), start + len(data))
        if not more:
            break
        data += more
    return data


def hash_range(descriptor: int, start: int, length: int, *others: Hash) -> str:
    """SHA-256, hexadecimal, of ``length`` bytes from ``start`` on (of fewer, where the file ends before).

    Args:
        others: hashes that take the same bytes.
    """
    sha256 = hashlib.sha256()
    position = start
    stop = start + length
    while position < stop:
        data = os.pread(descriptor, min(HASH_CHUNK, stop - position), position)
        if not data:
            break
        for hashes in (sha256, *others):
            hashes.update(data)
        position += len(data)
    return sha256.hexdigest()


def file_size(path: Path, error: type[InputError]) -> int:
    """Bytes of a file that is going to be read.

    Raises:
        OSError: it is missing, or not to be looked at.
        error: it is not a regular file: a pipe would be waited for, a device read for ever.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise error(f"{path.name}: not a regular file ({path})")
    return state.st_size


def hash_file(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return hash_range(descriptor, 0, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all.

    Raises:
        RoomError, DiskError: it cannot be written.
    """
    with new_file(path) as file:
        file.write(data)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file of any size, whole or not at all, as ``write_file``."""
    with source.open("rb") as file, new_file(path) as out:
        shutil.copyfileobj(file, out, HASH_CHUNK)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Inside, a file to write and read. It has a temporary name, is synced at the end, and then gets its name. After any error,
    Ctrl-C included, nothing is left of it; a file that had its name before stays, or is replaced.

    Raises:
        RoomError, DiskError: it cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    existed = os.path.lexists(path)
    with disk_errors(path.parent):
        partial.unlink(missing_ok=True)  # of a killed run, or a link
        try:
            with open(partial, "w+b", opener=lambda *_: open_for_writing(partial)) as file:
                yield file
                # Synced before it is renamed: after a power cut the name must not belong to an empty file.
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            fsync_folder(path.parent)
        except BaseException:
            remove(partial)
            # A rename that could not be synced may be lost later: better now.
            if not existed:
                remove(path)
            raise


def remove(path: Path) -> None:
    """Remove a file after an error. That error is to be reported: where the file cannot be removed, it stays."""
    with suppress(OSError):
        path.unlink()


def fsync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut: POSIX requires that the folder itself is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
