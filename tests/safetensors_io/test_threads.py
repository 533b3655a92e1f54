"""Pools that Ctrl-C cannot leave half made, as KeyboardInterrupt comes in a notebook: no thread waits for ever."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from qmerge.run.workers import run_parallel
from qmerge.safetensors_io.threads import started_pool


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(name)]


def interrupted_at(number: int) -> Any:
    """``Thread.start``, which is interrupted when this thread has begun and its pool does not know of it yet."""
    begun: list[None] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        begun.append(None)
        if len(begun) == number:
            raise KeyboardInterrupt

    return interrupted


def test_all_threads_run_and_were_prepared() -> None:
    prepared: list[str] = []
    pool = started_pool(3, "whole", lambda: prepared.append(threading.current_thread().name))
    assert len(set(prepared)) == len(threads_named("whole")) == 3
    assert sorted(pool.map(abs, range(-9, 0))) == list(range(1, 10))
    assert len(threads_named("whole")) == 3
    pool.shutdown()


@pytest.mark.parametrize("number", [1, 3])
def test_what_prepare_raises_is_raised(number: int) -> None:
    """In the last thread, too: the others wait for it."""
    called: list[None] = []

    def prepare() -> None:
        called.append(None)
        if len(called) == number:
            raise MemoryError("no room for a thread")

    with pytest.raises(MemoryError, match="no room for a thread"):
        started_pool(3, "unprepared", prepare)
    deadline = time.monotonic() + 10
    while threads_named("unprepared") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads_named("unprepared")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_thread_is_left_of_a_pool_that_was_interrupted(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted_at(number))
        started_pool(3, f"half {number}")
    deadline = time.monotonic() + 20
    while threads_named(f"half {number}"):
        assert time.monotonic() < deadline, "a thread waits for ever"
        time.sleep(0.01)


HANGS = """
import threading
from concurrent.futures import ThreadPoolExecutor
start = threading.Thread.start
def interrupted(thread):
    start(thread)
    raise KeyboardInterrupt
threading.Thread.start = interrupted
pool = ThreadPoolExecutor(1)
try:
    pool.submit(int)
except KeyboardInterrupt:
    pass
"""


def test_a_pool_of_the_library_would_keep_the_process() -> None:
    """The control."""
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", HANGS], timeout=2, check=False)


def test_steps_that_have_not_begun_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while steps are handed to workers."""
    done: list[int] = []

    def run(step: Any) -> None:
        time.sleep(0.2)
        done.append(step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted_at(2))
        run_parallel(range(50), run, 3)  # type: ignore[arg-type]
    time.sleep(0.5)
    assert len(done) <= 2
