"""Threads of this process: torch, hashing and file reads leave Python's lock, so they overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from qmerge.types import Step


def run_steps(steps: Sequence[Step], do: Callable[[Step], None], workers: int) -> None:
    """Every step once, in order for one worker, in any order for several; the first error ends it and is raised."""
    if workers == 1:
        for step in steps:
            do(step)
        return
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(do, step) for step in steps]
        try:
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
