"""A calibration that does not fit into ``--max-memory``."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

import qmerge
from qmerge.calibration import room, statistics
from qmerge.errors import RoomError
from qmerge.planning.memory import calibration_memory
from qmerge.planning.plan import Plan, make_plan
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

from ..conftest import snapshot
from .test_calibration import asked

CPU = torch.device("cpu")
TOKENS = 2560 + 512
"""Of ``asked``: its own text without the held-out part, and general text."""


def demo_plan() -> Plan:
    settings = asked(Path("out"))
    del settings["quiet"]
    with Reader() as reader:
        return make_plan(make_recipe(settings), reader)


def needed(tokens: int) -> int:
    """Bytes, of the demo model."""
    return calibration_memory(demo_plan().steps, tokens, sequential=True)


def test_batches_in_turn_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qmerge.merge(**asked(tmp_path / "together"))
    folders: list[Path] = []

    def counted(output: Any, folder: Path) -> Any:
        folders.append(folder)
        return room.in_mapped_file(output, folder)

    monkeypatch.setattr(statistics, "in_mapped_file", counted)
    monkeypatch.setattr(room, "BATCH_TOKENS", 1024)
    between = (needed(1024) + needed(2048)) // 2
    qmerge.merge(**asked(tmp_path / "in-turn", max_memory=str(between)))
    assert set(folders) == {tmp_path}, "hidden states are kept beside the output"
    assert snapshot(tmp_path / "in-turn")["model.safetensors"] == snapshot(tmp_path / "together")["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in-turn", "together"]


def test_refused_where_one_batch_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(
        RoomError, match=r"calibration needs about 0\.0\d GB.*--max-memory is 20MB: .*--calibration none"
    ):
        qmerge.merge(**asked(tmp_path / "out", max_memory="20MB"))
    assert not list(tmp_path.iterdir())


def test_without_a_limit_it_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free may grow again; but batches take turns."""
    plan = demo_plan()
    assert room.planned_memory(plan, TOKENS, CPU) == (needed(TOKENS), False)
    monkeypatch.setattr(room, "memory_limit", lambda max_memory, device: 1)
    assert room.planned_memory(plan, TOKENS, CPU) == (needed(room.BATCH_TOKENS), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mapped_file_holds_the_hidden_states(dtype: torch.dtype, tmp_path: Path) -> None:
    hidden_states = torch.randn(2, 3, 4).to(dtype)
    kept = room.in_mapped_file((hidden_states.transpose(0, 1), "cache"), tmp_path)
    assert torch.equal(kept[0], hidden_states.transpose(0, 1)) and kept[1] == "cache"
    assert kept[0].dtype == dtype and kept[0].data_ptr() != hidden_states.data_ptr()
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**settings: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room.tempfile, "NamedTemporaryFile", full)
    with pytest.raises(RoomError, match="no room left"):
        room.in_mapped_file(torch.zeros(1), tmp_path)
