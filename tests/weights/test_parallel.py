"""Row blocks in threads: results in order, errors, and the same bytes with any number of threads."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

import qmerge
from qmerge.demo import build
from qmerge.types import Rows
from qmerge.weights import blocks
from qmerge.weights.parallel import cpu_threads, map_blocks, one_torch_thread

DEMO = Path(build.__file__).parent
BLOCKS = [Rows(start, start + 1) for start in range(20)]


@pytest.mark.parametrize("threads", [1, 3])
def test_results_come_in_order(threads: int) -> None:
    def work(rows: Rows) -> int:
        time.sleep(0.002 * (rows.start % 3))  # later blocks are ready before earlier ones
        return rows.start

    assert list(map_blocks(work, BLOCKS, threads)) == list(range(20))


def test_blocks_overlap_and_each_has_one_torch_thread() -> None:
    meeting = threading.Barrier(3, timeout=60)

    def work(rows: Rows) -> int:
        if rows.start < 3:
            meeting.wait()  # passes only when three blocks are worked on at once
        return torch.get_num_threads()

    assert set(map_blocks(work, BLOCKS, 3)) == {1}


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_error_is_raised(threads: int) -> None:
    def work(rows: Rows) -> int:
        if rows.start >= 5:
            raise ValueError(rows.start)
        return rows.start

    with pytest.raises(ValueError, match=r"^5$"):
        list(map_blocks(work, BLOCKS, threads))


def test_torch_has_its_threads_back() -> None:
    threads = cpu_threads()
    with one_torch_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("target", ["nf4", "int8"])
def test_bytes_do_not_depend_on_threads(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept scales, and scales that are made from the merged weight, in row blocks of 2**12 values."""
    written = []
    monkeypatch.setattr(blocks, "CACHED_ENTRIES", 2**12)
    for threads in (1, 3):
        monkeypatch.setattr(blocks, "cpu_threads", lambda threads=threads: threads)
        out = tmp_path / str(threads)
        qmerge.merge(base=DEMO / "base-nf4", adapter=DEMO / "adapter", target=target, rounding="nearest", out=out)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]
