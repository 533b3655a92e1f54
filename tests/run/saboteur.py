"""Makes the n-th operating system call of a process that changes the disk fail, or sends a signal in its place.

All functions of ``os`` that change the disk are wrapped, and ``open`` for writing. Whatever Python code writes with (pathlib,
tempfile, shutil, filelock, other packages) goes through these. Only files below one folder count.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FULL = "full disk"
"""The name of the fault that lasts: from the n-th call on, nothing that needs space succeeds."""

ON_DESCRIPTORS = ("write", "pwrite", "fsync", "fdatasync", "ftruncate", "posix_fallocate", "sendfile")
ON_PATHS = ("unlink", "remove", "mkdir", "rmdir", "truncate")
ON_TWO_PATHS = ("rename", "replace", "link", "symlink")
"""Names of functions of ``os``. Of two paths, the second is the one that changes."""

NEED_SPACE = frozenset(
    {"open", "write", "pwrite", "ftruncate", "posix_fallocate", "sendfile", "mkdir", "link", "symlink"}
)
"""Calls that a full disk refuses. It can still rename, remove and sync."""

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Saboteur:
    """Counts the calls that change something below ``folder``, and strikes at one of them, before the change.

    Args:
        at: number of the call, from 1.
        fault: name of an error (``ENOSPC``), ``FULL``, or a signal's number. An interrupted write, and one without room, has
            written half of its bytes.

    Attributes:
        log: name of each call, and of its file.
    """

    def __init__(self, folder: Path, at: int, fault: str | int) -> None:
        self.folder = os.path.realpath(folder)
        self.at = at
        self.fault = fault
        self.log: list[str] = []
        self._lock = threading.RLock()

    def install(self) -> None:
        """Wrap the functions, for the rest of the life of this process."""
        for name in ON_DESCRIPTORS:
            setattr(os, name, self._on_descriptor(name, getattr(os, name)))
        for name in ON_PATHS:
            setattr(os, name, self._on_path(name, getattr(os, name), 0))
        for name in ON_TWO_PATHS:
            setattr(os, name, self._on_path(name, getattr(os, name), 1))
        os.open = self._open(os.open)
        io.open = builtins.open = self._file_open(io.open)

    def around(self, call: str, path: str, change: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """``change()``, or the fault; ``path`` may be anywhere."""
        if not path.startswith(self.folder):
            return change()
        with self._lock:
            self.log.append(f"{call} {os.path.relpath(path, self.folder)}")
            number = len(self.log)
        if number == self.at or (number > self.at > 0 and self.fault == FULL and call in NEED_SPACE):
            self._strike(call, path, half)
        return change()

    def _strike(self, call: str, path: str, half: Callable[[], Any] | None) -> None:
        if isinstance(self.fault, int):
            if half:
                half()
            os.kill(os.getpid(), self.fault)
            return
        code = getattr(errno, "ENOSPC" if self.fault == FULL else self.fault)
        if self.fault == FULL and call not in NEED_SPACE:
            return
        if half and code == errno.ENOSPC:
            half()
        raise OSError(code, os.strerror(code), *([] if call in ON_DESCRIPTORS else [path]))

    def _on_descriptor(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(descriptor: int, *rest: Any) -> Any:
            half = None
            if name in ("write", "pwrite"):
                data = bytes(rest[0])
                half = lambda: real(descriptor, data[: len(data) // 2], *rest[1:])  # noqa: E731
            return self.around(name, _path_of(descriptor), lambda: real(descriptor, *rest), half)

        return wrapped

    def _on_path(self, name: str, real: Callable[..., Any], which: int) -> Callable[..., Any]:
        def wrapped(*paths: Any, **options: Any) -> Any:
            path = _absolute(paths[which], options.get("dir_fd"))
            return self.around(name, path, lambda: real(*paths, **options))

        return wrapped

    def _open(self, real: Callable[..., int]) -> Callable[..., int]:
        def wrapped(path: Any, flags: int, *rest: Any, dir_fd: int | None = None, **more: Any) -> int:
            if not flags & WRITING:
                return real(path, flags, *rest, dir_fd=dir_fd, **more)
            return int(
                self.around("open", _absolute(path, dir_fd), lambda: real(path, flags, *rest, dir_fd=dir_fd, **more))
            )

        return wrapped

    def _file_open(self, real: Callable[..., Any]) -> Callable[..., Any]:
        saboteur = self

        class CountedFile(io.FileIO):
            """The buffers above call these methods, so that each write counts."""

            def write(self, data: Any) -> int:
                half = bytes(data)[: len(bytes(data)) // 2]
                written = saboteur.around(
                    "write",
                    _path_of(self.fileno()),
                    lambda: io.FileIO.write(self, data),
                    lambda: io.FileIO.write(self, half),
                )
                return int(written)

            def truncate(self, size: int | None = None) -> int:
                change = lambda: io.FileIO.truncate(self, size)  # noqa: E731
                return int(saboteur.around("ftruncate", _path_of(self.fileno()), change))

        def wrapped(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
            newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if not set(mode) & set("wax+"):
                return real(file, mode, buffering, encoding, errors, newline, closefd, opener)

            def opened() -> CountedFile:
                return CountedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)

            # A descriptor, or an opener, was counted by os.open.
            is_counted = isinstance(file, int) or opener is not None
            raw = opened() if is_counted else saboteur.around("open", _absolute(file, None), opened)
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        return wrapped


def _path_of(descriptor: Any) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _absolute(path: Any, dir_fd: int | None) -> str:
    """The absolute path, whose last part may be a link."""
    if isinstance(path, int):
        return _path_of(path)
    folder = Path.cwd() if dir_fd is None else Path(_path_of(dir_fd))
    return os.path.normpath(folder / os.fsdecode(path))
