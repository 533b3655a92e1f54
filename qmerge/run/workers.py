"""Several steps at once, in threads of this process: torch, hashing and file reads release Python's lock, so they
overlap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

from qmerge.types import Step


def run_parallel(steps: Sequence[Step], run: Callable[[Step], None], workers: int) -> None:
    """Run every step once: in order with one worker, in any order with several.

    Raises:
        Whatever the first failing step raised; steps that have not started are dropped.
    """
    if workers == 1:
        for step in steps:
            run(step)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            futures = [pool.submit(run, step) for step in steps]
            finished, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
        except BaseException:  # Ctrl-C, too
            pool.shutdown(wait=True, cancel_futures=True)
            raise
