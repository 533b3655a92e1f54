"""Memory that was freed goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from qmerge.weights.heap import map_large_blocks, release_freed_memory

ROOT = Path(__file__).parent.parent.parent


def test_memory_below_a_block_in_use_is_released() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc keeps such memory, and has a function that releases it")
    # A process of its own: memory that other tests have freed would be used again.
    subprocess.run([sys.executable, "-c", f"from {__name__} import use_memory; use_memory()"], check=True, cwd=ROOT)


@pytest.mark.parametrize("mapped", [True, False])
def test_large_blocks_go_back_when_they_are_freed(mapped: bool) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("only glibc keeps such memory, and can be told not to")
    code = f"from {__name__} import use_large_blocks; use_large_blocks({mapped})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def use_large_blocks(mapped: bool) -> None:
    """Free every second one of many blocks of 4 MB, from below others that stay in use."""
    if mapped:
        map_large_blocks()
    process = psutil.Process()
    torch.zeros(2**22)  # 16 MB, mapped and freed: from now on, glibc by itself keeps smaller blocks
    blocks: list[torch.Tensor | None] = [torch.zeros(2**20) for _ in range(50)]
    before = process.memory_info().rss
    for number in range(0, len(blocks), 2):
        blocks[number] = None
    returned = before - process.memory_info().rss
    assert returned > 90e6 if mapped else returned < 20e6


def use_memory() -> None:
    """Use memory, free it, release it."""
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
