"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform

import psutil
import pytest
import torch

from qmerge.calibration.heap import release_freed_memory


def test_memory_below_a_block_in_use_is_released() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc keeps such memory, and has a function that releases it")
    process = psutil.Process()
    before = process.memory_info().rss
    # Blocks too small to be mapped one by one (at most 32 MiB, once such a block has been freed).
    large: list[torch.Tensor | None] = [torch.zeros(2**18)]
    large.clear()
    small = []
    for _ in range(200):
        large.append(torch.zeros(2**18))
        small.append(torch.zeros(2**10))
    large.clear()
    kept = process.memory_info().rss - before
    release_freed_memory()
    assert process.memory_info().rss - before < 50e6
    assert len(small) == 200 and kept > 150e6, "the control: without the call, the memory stays"
