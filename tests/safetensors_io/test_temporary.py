"""Temporary folders: removed, whenever a signal comes; left by a killed run, removed by the next one."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from qmerge.safetensors_io.temporary import PREFIX, remove_left_folders, temporary_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


def interrupted_once(function: Any, *, after: bool) -> Any:
    """The function, which a signal interrupts at its first call, before its work or after it."""
    calls: list[None] = []

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) > 1:
            return function(*arguments, **options)
        if after:
            function(*arguments, **options)
        raise KeyboardInterrupt

    return wrapped


def test_it_is_removed_with_its_content(place: Path) -> None:
    with temporary_folder() as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("x")
        assert names(place) == [folder.name]
    assert names(place) == []


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["mkdir", "rmdir", "unlink"])
def test_a_signal_leaves_nothing(place: Path, call: str, after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Path if call == "mkdir" else os
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(owner, call, interrupted_once(getattr(owner, call), after=after))
        with temporary_folder() as folder:
            (folder / "file").write_text("x")
    assert names(place) == []


def test_the_library_would_leave_its_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", interrupted_once(os.rmdir, after=False))
        with tempfile.TemporaryDirectory():
            pass
    assert len(names(place)) == 1


KILLED = """
import os, signal
from qmerge.safetensors_io.temporary import folder_until_exit, temporary_folder
(folder_until_exit() / "file").write_text("x")
with temporary_folder():
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_run_removes_what_a_killed_one_has_left(place: Path) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], env={**os.environ, "TMPDIR": str(place)}, check=False)
    assert killed.returncode == -signal.SIGKILL and len(names(place)) == 2
    of_another_machine = f"qmerge-{'0' * 8}-{'0' * 32}"
    kept = {"qmerge-mine", f"{PREFIX}{'0' * 31}", of_another_machine, "other"}
    for name in kept:
        (place / name).mkdir()
    (place / f"{PREFIX}{'1' * 32}").symlink_to(place / "other")
    kept.add(f"{PREFIX}{'1' * 32}")
    with temporary_folder() as folder:
        assert set(names(place)) == {*kept, folder.name}
        remove_left_folders()  # as another run: this one is in use
        assert folder.exists()
    assert set(names(place)) == kept


def test_the_folder_of_another_user_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = place / f"{PREFIX}{'2' * 32}"
    left.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        remove_left_folders()
    assert left.exists()
    remove_left_folders()
    assert not left.exists()


def test_a_folder_that_is_removed_before_it_is_locked_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir
    removed: list[Path] = []

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        make(path, *arguments, **options)
        if len(removed) < 2:
            removed.append(path)
            shutil.rmtree(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with temporary_folder() as folder:
        assert folder.is_dir() and len(removed) == 2


def test_a_folder_that_is_removed_while_it_is_being_locked_is_made_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run held the lock, and removes the folder as the last thing it does."""
    lock = fcntl.flock
    removed: list[Path] = []

    def flock(descriptor: int, operation: int) -> None:
        lock(descriptor, operation)
        if not removed:
            removed.extend(place.iterdir())
            shutil.rmtree(removed[0])

    monkeypatch.setattr(fcntl, "flock", flock)
    with temporary_folder() as folder:
        assert folder.is_dir() and removed == [folder]
