"""Row blocks of one weight at once, in threads of this process: torch, numba and file reads release Python's lock.

torch itself divides every operation among threads that then wait for one another. For small blocks that costs more than it
gains, and on a busy machine many times more. So each block is worked on by one thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

from qmerge.safetensors_io.threads import started_pool
from qmerge.types import Rows

T = TypeVar("T")


_lock = threading.Lock()
"""Of the two caches below: with ``--workers``, several threads come to them at once."""


def cpu_threads() -> int:
    """Threads that this process may use: torch's number of them, before anything here has changed it."""
    with _lock:
        return _torch_threads()


@cache
def _torch_threads() -> int:
    return torch.get_num_threads()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Inside, torch uses one thread for what the calling thread does."""
    threads = cpu_threads()
    # torch looks up its number of threads when a thread first needs it, which would undo an earlier setting.
    torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def map_blocks(work: Callable[[Rows], T], blocks: Iterable[Rows], threads: int) -> Generator[T, None, None]:
    """``work`` of every block, in the order of the blocks. As many as there are threads are worked on at once.

    Raises:
        Whatever the first failing block raised.
    """
    if threads == 1:
        yield from map(work, blocks)
        return
    with _lock:
        pool = _pool(threads)
    running: deque[Future[T]] = deque()
    try:
        for rows in blocks:
            running.append(pool.submit(work, rows))
            # One more than there are threads, so that none waits while a result is taken.
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
        wait(running)  # the files that the blocks read may be closed next


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in which torch uses no further ones; the calling thread has one, too."""

    def prepare() -> None:
        torch.get_num_threads()  # see one_torch_thread
        torch.set_num_threads(1)

    return started_pool(threads, "qmerge-blocks", prepare)
