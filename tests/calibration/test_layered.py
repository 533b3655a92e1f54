"""A model with one decoder layer in memory computes the logits of the whole model, bit for bit, in every architecture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from qmerge.calibration.forward import ForwardPass
from qmerge.calibration.layered import LayeredModel
from qmerge.errors import CheckpointError

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": SMALL,
    "Qwen2": SMALL,
    "Phi3": SMALL,
    "Gemma2": {**SMALL, "head_dim": 8, "sliding_window": 8},
    "Mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {**SMALL, **EXPERTS, "num_experts": 4, "head_dim": 8},
    "GPTNeoX": {name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
    "GPT2": {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "OPT": {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Falcon": {**SMALL, "intermediate_size": 128},
    "DeepseekV3": {
        **SMALL, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8,
        "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    },
}  # fmt: skip
IDS = [torch.arange(24).view(2, 12) * k % 96 for k in (1, 5)]
CPU = torch.device("cpu")


def saved(name: str, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """(config, tensors on disk, logits of the whole model) of a random model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    model.save_pretrained(folder)
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for ids in IDS]
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), logits


def in_memory(model: LayeredModel) -> set[int | None]:
    """Decoder layers whose weights are in memory; None: everything outside the layers."""
    return {model.layer_of(name) for name, p in model.model.named_parameters() if not p.is_meta}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_layer_by_layer(name: str, tmp_path: Path) -> None:
    config, tensors, expected = saved(name, tmp_path)
    model = LayeredModel(config, tensors, CPU)
    run: Any = model.model
    passes = [ForwardPass(lambda ids=ids: run(input_ids=ids, use_cache=False).logits) for ids in IDS]  # type: ignore[misc]
    with model.loaded(None, lambda key: tensors[key].float()):
        at = [one.advance() for one in passes]
        for index in range(len(model)):
            with model.loaded(index, lambda key: tensors[key].float()):
                assert in_memory(model) == {None, index}
                at = [one.advance(model.run_layer(visit)) for one, visit in zip(passes, at, strict=True)]
    assert in_memory(model) == set()
    assert all(torch.equal(found, logits) for found, logits in zip(at, expected, strict=True))


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    config, tensors, _ = saved("Llama", tmp_path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    model = LayeredModel(config, tensors, CPU)
    with pytest.raises(CheckpointError, match=r"no values for model\.layers\.1\.mlp\.up_proj\.weight"):
        model.load(1, model.names(1), lambda key: tensors[key])


def test_an_unknown_architecture_is_an_error() -> None:
    with pytest.raises(CheckpointError, match="cannot build"):
        LayeredModel({"model_type": "nobody_knows", "architectures": ["NobodyKnows"]}, [], CPU)


def test_errors_inside_the_model_reach_the_caller(tmp_path: Path) -> None:
    config, tensors, _ = saved("Llama", tmp_path)
    model = LayeredModel(config, tensors, CPU)
    run: Any = model.model
    with model.loaded(None, lambda key: tensors[key].float()), pytest.raises(IndexError):
        ForwardPass(lambda: run(input_ids=torch.tensor([[960]]))).advance()
