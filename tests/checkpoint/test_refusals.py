"""Folders, configs and tensors on disk that cannot be followed, and what is left behind after an error."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qmerge.checkpoint import traced
from qmerge.checkpoint.architecture import _embedding_weights
from qmerge.checkpoint.at_once import _remove_leftovers, all_or_nothing
from qmerge.checkpoint.blocks import DiskBlock
from qmerge.checkpoint.config import with_setting
from qmerge.checkpoint.consistency import config_problem
from qmerge.checkpoint.folder import LOCK
from qmerge.checkpoint.journal import STEP_TYPES, Journal
from qmerge.checkpoint.model_cards import card_text
from qmerge.checkpoint.replication import _default_layer_types, _replicated_config
from qmerge.checkpoint.traced import TracedTensor, traced_weight
from qmerge.errors import CheckpointError, RoomError

# --- folders ---------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_run_in_folders(tmp_path: Path) -> None:
    """Files and folders are removed; but nothing at all where one file is somebody else's."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in (LOCK, "x", "a/y.partial", "a/b/z"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "own notes").touch()
    _remove_leftovers(tmp_path, ("x", "a/y", "a/b/z"))
    assert (tmp_path / "x").exists()
    (tmp_path / "a" / "own notes").unlink()
    _remove_leftovers(tmp_path, ("x", "a/y", "a/b/z"))
    assert [path.name for path in tmp_path.rglob("*")] == [LOCK]


@pytest.mark.parametrize("existed", [True, False])
def test_files_in_folders_are_removed_after_an_error(existed: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    with pytest.raises(KeyError), all_or_nothing(out, ("x", "a/b/z")):
        (out / "a" / "b").mkdir(parents=True)
        (out / "x").touch()
        (out / "a" / "b" / "z").touch()
        raise KeyError
    assert list(tmp_path.rglob("*")) == ([out] if existed else [])


def test_a_journal_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short write is an error: the line is damaged, and resuming does the step again."""
    journal = Journal(tmp_path, {"a": 1}, resume=False)
    record: dict[str, Any] = {
        name: {} if kind is object else kind() for name, kind in STEP_TYPES.items() if name != "step"
    }
    journal.step_done("one", record)
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[: len(data) // 2]))
    with pytest.raises(RoomError, match="no room left"):
        journal.step_done("two", record)
    monkeypatch.undo()
    assert Journal(tmp_path, {"a": 1}, resume=True).steps.keys() == {"one"}


def test_a_card_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("text")
    assert card_text(tmp_path) == "text"

    def fails(self: Path, mode: str) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", fails)
    assert card_text(tmp_path) == ""


# --- configs ---------------------------------------------------------------------------------------------------------


def test_a_setting_is_changed_where_it_is() -> None:
    assert with_setting({"a": 1}, "a", 2) == {"a": 2}
    assert with_setting({"text_config": {"a": 1}}, "a", 2) == {"text_config": {"a": 2}}
    assert with_setting({"a": 1, "text_config": {"a": 1, "b": 3}}, "a", 2) == {"a": 2, "text_config": {"a": 2, "b": 3}}
    assert with_setting({"text_config": {"b": 1}}, "a", 2) == {"text_config": {"b": 1}, "a": 2}


def weights(**shapes: tuple[int, ...]) -> dict[str, Any]:
    names = {"embed": "embed_tokens", "q": "layers.0.self_attn.q_proj", "k": "layers.0.self_attn.k_proj"}
    return {
        f"model.{names[key]}.weight": SimpleNamespace(shape=shape, name=names[key]) for key, shape in shapes.items()
    }


def test_heads_that_the_tensors_contradict() -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
    sound = weights(embed=(96, 32), q=(32, 32), k=(32, 32))
    assert config_problem(config, sound) is None
    assert config_problem({**config, "num_attention_heads": 5}, sound) is not None
    assert "num_key_value_heads" in str(config_problem(config, weights(embed=(96, 32), q=(32, 32), k=(16, 32))))
    assert config_problem({**config, "num_key_value_heads": 2}, weights(q=(32, 32), k=(16, 32))) is None
    # Nothing to compare with.
    for unknown in ({"num_attention_heads": None}, {"hidden_size": None}, {"head_dim": "8"}):
        assert config_problem({**config, **unknown}, weights(q=(99, 32), k=(16, 32))) is None


def test_configs_whose_layers_cannot_be_replicated() -> None:
    assert _replicated_config({"num_hidden_layers": 2}, [0, 1, 1], 2)["num_hidden_layers"] == 3
    for modules in (["model.layers.1.mlp"], {"model.layers.1": 4}, [{"targets": ("a.0.b",)}]):
        with pytest.raises(CheckpointError, match="quantization_config names single ones"):
            _replicated_config({"num_hidden_layers": 2, "quantization_config": {"skip": modules}}, [0, 1, 1], 2)
    with pytest.raises(CheckpointError, match=r"config.json does not say that the base has 3"):
        _replicated_config({"num_hidden_layers": 2}, [0, 1, 1], 3)


def test_architectures_that_transformers_does_not_know() -> None:
    assert _default_layer_types({"model_type": "nobody's"}) == {}
    assert _embedding_weights('{"model_type": "nobody\'s"}') is None


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_operations_that_are_no_rearrangement(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = traced_weight("w", (4, 6))
    with pytest.raises(CheckpointError, match="a slice with steps is not a rearrangement"):
        tensor[:, ::2]
    with pytest.raises(CheckpointError, match=r"shapes \[4, 6\] and \[4, 5\] do not fit together"):
        torch.cat([tensor, traced_weight("v", (4, 5))])
    monkeypatch.setattr(traced, "MOST_PIECES", 3)
    with pytest.raises(CheckpointError, match="it falls into 4 blocks"):
        torch.cat([tensor] * 4)


def test_operations_that_change_nothing() -> None:
    tensor = traced_weight("w", (4, 6))
    for same in (tensor.squeeze(0), tensor.detach(), tensor.clone()):
        assert isinstance(same, TracedTensor) and tuple(same.shape) == (4, 6) and same.pieces == tensor.pieces
    assert tuple(traced_weight("w", (1, 6)).squeeze(0).shape) == (6,)


def test_a_block_of_a_vector_is_not_transposed_and_takes_no_lora() -> None:
    block = DiskBlock(
        weight="w", parameter="p", shape=(4,), region=(range(4),), disk_region=(range(4),), axes=(0,)
    )  # fmt: skip
    assert not block.transposed
    with pytest.raises(
        CheckpointError, match="w: rows and columns of p are not the last two axes of this weight on disk"
    ):
        block.factors(torch.zeros(2, 4), torch.zeros(4, 2), (4,))
