"""Pools of threads that Ctrl-C cannot leave half made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress


def started_pool(threads: int, name: str, prepare: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    """A pool whose threads all run already, for pools that live as long as the process.

    A pool does not know of a thread whose start is interrupted (KeyboardInterrupt in a notebook), and the process would wait for
    that thread for ever when it ends. Here, all threads start at once; where one does not, all of them end.

    Args:
        name: what the names of the threads begin with.
        prepare: is called in each thread first. What it raises is raised here.
    """
    started = threading.Barrier(threads + 1)
    failures: list[BaseException] = []

    def start() -> None:
        try:
            if prepare:
                prepare()
        except BaseException as failure:  # raised below: a pool that learns of it may leave a thread waiting
            failures.append(failure)
            started.abort()
        with suppress(threading.BrokenBarrierError):
            started.wait()

    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=start)
    try:
        for _ in range(threads):
            pool.submit(int)  # starts a thread, as long as none is idle: none is before all have started
        started.wait()
    except BaseException:
        started.abort()
        pool.shutdown(wait=False)
        if failures:
            raise failures[0] from None
        raise
    return pool
