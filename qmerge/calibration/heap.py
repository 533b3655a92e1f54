"""Return freed memory to the system."""

from __future__ import annotations

import ctypes
import sys


def release_freed_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc; elsewhere do nothing.

    glibc keeps what is freed below a block still in use. While decoder layers are loaded and unloaded, the hidden states
    between them are such blocks, so a process would grow by about the size of each layer.
    """
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # musl has none
        trim(0)
