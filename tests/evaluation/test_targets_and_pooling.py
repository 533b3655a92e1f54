"""What a decoder sees, as the models' own code and the usual collators have it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM
from transformers.models.whisper import modeling_whisper

from qmerge.calibration.tasks import shifted_right, without_start
from qmerge.errors import CheckpointError
from qmerge.evaluation.whole_fidelity import pooling_of

SMALL = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 40, "max_position_embeddings": 32}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
MODELS: dict[str, dict[str, Any]] = {
    "bart": {**SMALL, **HEADS}, "mbart": {**SMALL, **HEADS}, "whisper": {**SMALL, **HEADS, "decoder_start_token_id": 3},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 40, "decoder_start_token_id": 0},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_decoder_inputs_are_the_models_own(name: str) -> None:
    config = AutoConfig.for_model(name, **{**MODELS[name], "pad_token_id": 1})
    labels_1L = torch.tensor([[7, 8, 9, 2]])
    if name == "whisper":
        expected = modeling_whisper.shift_tokens_right(labels_1L, config.pad_token_id, config.decoder_start_token_id)
    else:
        model = AutoModelForSeq2SeqLM.from_config(config)
        expected = model.prepare_decoder_input_ids_from_labels(labels=labels_1L)
    assert torch.equal(shifted_right(config, labels_1L), expected)


def test_a_start_token_is_not_predicted() -> None:
    config = AutoConfig.for_model("whisper", decoder_start_token_id=3)
    assert without_start(config, torch.tensor([[3, 7, 8]])).tolist() == [[7, 8]]
    assert without_start(config, torch.tensor([[7, 3, 8]])).tolist() == [[7, 3, 8]]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "lasttoken"),
        ({"pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_max_tokens": True}, None),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, None),
    ],
)
def test_pooling_is_the_folders(tmp_path: Path, settings: dict[str, Any], expected: str | None) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if expected is None:
        with pytest.raises(CheckpointError, match="max_tokens"):
            pooling_of(tmp_path)
    else:
        assert pooling_of(tmp_path) == expected
