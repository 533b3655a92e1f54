"""When freed memory goes back to the system, where the C library is glibc; elsewhere these functions do nothing."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of ``mallopt``, from malloc.h."""


def keep_freed_memory() -> None:
    """From now on, keep some freed memory for the next row block of a weight.

    By default glibc gives arrays of 1 MB back to the system and asks for them again: a quarter of a merge's CPU time.
    """
    _set_option(M_MMAP_THRESHOLD, 2**25)
    _set_option(M_TRIM_THRESHOLD, 2**26)


def map_large_blocks() -> None:
    """From now on, let blocks of 2 MB and more go back to the system when they are freed.

    glibc would keep them for the thread that allocated them (up to 32 MB each). The batches of a calibration wait in threads of
    their own, so each would keep the largest tensors of a layer: twice the memory of a calibration, for 4 % less CPU time.
    """
    _set_option(M_MMAP_THRESHOLD, 2**21)


def release_freed_memory() -> None:
    """Give memory that was freed back to the system.

    glibc keeps what is freed below a block still in use. While decoder layers are loaded and unloaded, the hidden states
    between them are such blocks, so a process would grow by about the size of each layer.
    """
    malloc_trim = _glibc_function("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def _set_option(parameter: int, nbytes: int) -> None:
    mallopt = _glibc_function("mallopt")
    if mallopt is not None:
        mallopt(parameter, nbytes)


def _glibc_function(name: str) -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function: Callable[..., int] | None = getattr(ctypes.CDLL(None), name, None)  # musl has neither
    return function
