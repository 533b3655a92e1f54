"""MXFP4 experts (gpt-oss), read by transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .compressed import compress, make_scheme
from .layers import Tensors, Written

GPT_OSS = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 96, "sliding_window": 8,
    "max_position_embeddings": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip

DENSE_MODULES = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]


def gpt_oss(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A tiny random gpt-oss in bfloat16."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(seed)
    return GptOssForCausalLM(GptOssConfig(**{**GPT_OSS, **changes})).to(torch.bfloat16).eval()


def write(model: PreTrainedModel) -> Written:
    """The model as OpenAI ships it.

    transformers packs experts on a GPU only; compressed-tensors has the same codes, scales and order of nibbles.
    """
    from transformers import Mxfp4Config

    scheme = make_scheme("MXFP4A16")
    state: Tensors = dict(model.state_dict())
    for name in list(state):
        if name.endswith(("gate_up_proj", "down_proj")):
            weight_EOI = state.pop(name).transpose(1, 2).contiguous()
            experts, rows, _ = weight_EOI.shape
            parts = compress(weight_EOI.flatten(0, 1), scheme)
            state[f"{name}_blocks"] = parts["weight_packed"].view(experts, rows, -1, 16)
            state[f"{name}_scales"] = parts["weight_scale"].view(experts, rows, -1)
    return Written(state, Mxfp4Config(modules_to_not_convert=DENSE_MODULES).to_dict())


def read(tensors: Tensors, config: dict[str, Any], metadata: dict[str, str]) -> dict[str, Tensor]:
    """``code * 2 ** (scale - 127)`` as [E, I, O], by ``convert_moe_packed_tensors``."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    result = {}
    for key, blocks in tensors.items():
        if key.endswith("_blocks"):
            name = key.removesuffix("_blocks")
            result[name] = convert_moe_packed_tensors(blocks, tensors[f"{name}_scales"], dtype=torch.float32)
    return result
