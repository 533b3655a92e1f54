"""`qmerge verify` on models of every task: loaded with their own class, and computing what qmerge reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from qmerge.calibration.tasks import CAUSAL_LM, task_of
from qmerge.errors import CheckpointError
from qmerge.evaluation import loaders

from .. import kinds

COMPARED = {
    "bert": "hidden states and pooled output for a sentence",
    "bert-answers": "start and end logits for a sentence",
    "mpnet": "hidden states and pooled output for a sentence",
    "modernbert": "hidden states for a sentence",
    "albert": "hidden states and pooled output for a sentence",
    "llama-embeddings": "hidden states for a sentence",
    "whisper": "logits for a spectrogram of noise",
    "wav2vec2": "logits for a second of noise",
    "vit": "logits for an image of noise",
    "resnet": "logits for an image of noise",
    "clip": "embeddings for a sentence and an image of noise",
}
"""Kind of model → the outputs that are compared; logits for a sentence where it is not listed."""


@pytest.mark.parametrize("name", kinds.KINDS)
def test_loads_with_its_own_class(name: str, tmp_path: Path) -> None:
    """In NF4, too: what bitsandbytes computes. The controls: a missing weight, and other values."""
    model = kinds.build(name)
    model.save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = type(model).from_pretrained(
        tmp_path / "dense", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "nf4")
    compared = COMPARED.get(name, "logits for a sentence")
    for folder in (tmp_path / "dense", tmp_path / "nf4"):
        line = loaders.load_with_transformers(folder)
        assert line.startswith(
            f"{type(model).__name__} with transformers {transformers.__version__}, its {compared} are"
        )
        # Convolutions are computed in another order: an error of a float32 sum, relative to a sum near zero.
        assert "within 0.0 %" in line or name in ("resnet", "wav2vec2")
    assert ("no image was shown" in line) == (name == "llava")


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_controls(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing weight is named; another value of a weight is another output."""
    kinds.build(name).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = max(key for key in tensors if ".1." in key and key.endswith("weight") and tensors[key].ndim == 2)
    right = loaders.stored_outputs

    def with_other_values(checkpoint: Any, inputs: Any, reader: Any) -> Any:
        save_file({**tensors, key: 3 * tensors[key]}, tmp_path / "model.safetensors", metadata={"format": "pt"})
        return right(checkpoint, inputs, reader)

    with monkeypatch.context() as patched:
        patched.setattr(loaders, "stored_outputs", with_other_values)
        with pytest.raises(
            loaders.WrongOutputsError, match=r"its (logits|hidden states and pooled output) are \d+ % off"
        ):
            loaders.load_with_transformers(tmp_path)
    del tensors[key]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys: \['.*weight'\]"):
        loaders.load_with_transformers(tmp_path)


def test_no_memory_for_the_comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads; nothing is said about its outputs."""
    from qmerge.evaluation import stored

    kinds.build("bert").save_pretrained(tmp_path)
    monkeypatch.setattr(stored, "memory_limit", lambda *_: 1000)
    line = loaders.load_with_transformers(tmp_path)
    assert "loads; nothing was computed with it, because float32 values" in line and "memory are free" in line


def test_tasks_are_those_of_transformers() -> None:
    """Every list exists, and classes of these tasks are found in them."""
    found = {name: task_of({"architectures": [entry[0]]}).name for name, entry in kinds.KINDS.items()}
    assert found["bert"] == "embeddings" and found["bert-classes"] == "text classification"
    assert found["t5"] == found["bart"] == "text to text" and found["whisper"] == found["wav2vec2"] == "speech to text"
    assert found["vit"] == found["resnet"] == "image classification" and found["llava"] == CAUSAL_LM.name
    assert task_of({}) is task_of({"architectures": ["NobodyKnows"]}) is CAUSAL_LM
    assert task_of({"architectures": ["Gemma3ForConditionalGeneration"]}) is CAUSAL_LM
