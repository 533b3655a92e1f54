"""The tensors of a GGUF file: names, shapes and types, and the weight that each one comes from. ``gguf`` is the gguf package."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError, listed
from qmerge.gguf.families import OTHER_WAY, Family
from qmerge.gguf.hyperparameters import head_size, rope_factors, rope_parameters
from qmerge.types import Weight

DENSE_FORMATS = ("bf16", "fp16", "fp32")

Q8_0_BLOCK = 32
"""Values that share a scale in Q8_0."""


@dataclass(frozen=True, kw_only=True)
class PlannedTensor:
    """One tensor of the file.

    weight     where its values come from; None for a computed tensor, which has ``values``
    head_rows  rows of a head, which are permuted; 0: rows keep their order
    shift      added to all values
    """

    name: str
    shape: tuple[int, ...]
    type: str
    weight: Weight | None = None
    values: Tensor | None = None
    head_rows: int = 0
    shift: float = 0.0

    @property
    def entries(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def nbytes(self, gguf: Any) -> int:
        """Bytes in the file."""
        block_entries, block_bytes = gguf.GGML_QUANT_SIZES[quantization_type(gguf, self.type)]
        return self.entries // int(block_entries) * int(block_bytes)


def quantization_type(gguf: Any, type: str) -> Any:
    """``q8_0`` → gguf.GGMLQuantizationType.Q8_0."""
    return gguf.GGMLQuantizationType[type.upper()]


def plan_tensors(gguf: Any, checkpoint: Checkpoint, family: Family, config: Any, *, type: str) -> list[PlannedTensor]:
    """Every tensor of the file, in the order of the checkpoint; ``type`` is that of the matrices.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or not dense.
    """
    weights = needed_weights(checkpoint, config)
    check_weights(expected_shapes(family, config), weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch.upper()], config.num_hidden_layers)
    plan = []
    factors = rope_factors(rope_parameters(config), head_size(config))
    if factors is not None:
        plan.append(PlannedTensor(name="rope_freqs.weight", shape=tuple(factors.shape), type="f32", values=factors))
    for name, weight in weights.items():
        # Looks up the name without its suffix and puts the suffix back.
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        is_permuted = family.permutes_qk and name.endswith(("q_proj.weight", "k_proj.weight"))
        tensor = PlannedTensor(
            name=gguf_name,
            shape=weight.shape,
            type=type_of(weight.shape, type),
            weight=weight,
            head_rows=head_size(config) if is_permuted else 0,
            shift=family.norm_shift if name.endswith("norm.weight") else 0.0,
        )
        plan.append(tensor)
    return plan


def type_of(shape: tuple[int, ...], type: str) -> str:
    """The type of a tensor: vectors are F32, because llama.cpp computes with them in float32; rows that are not whole blocks
    of Q8_0 become F16."""
    if len(shape) < 2:
        return "f32"
    if type == "q8_0" and shape[-1] % Q8_0_BLOCK:
        return "f16"
    return type


def fallback_notes(plan: list[PlannedTensor], type: str) -> list[str]:
    """A note about matrices that did not get the wanted type."""
    names = [tensor.name for tensor in plan if len(tensor.shape) > 1 and tensor.type != type]
    if not names:
        return []
    reason = f"the length of their rows is not a multiple of {Q8_0_BLOCK}"
    return [f"stored as F16, not {type.upper()}, because {reason}: {listed(names)}"]


# --- the tensors that a folder must have -----------------------------------------------------------------------------


def needed_weights(checkpoint: Checkpoint, config: Any) -> dict[str, Weight]:
    """The weights of a checkpoint that the model uses."""
    needed = {}
    for name, weight in checkpoint.weights.items():
        is_tied_copy = name == "lm_head.weight" and config.tie_word_embeddings
        # Old checkpoints have a buffer that is computed from the config.
        is_buffer = name.endswith(".rotary_emb.inv_freq")
        if not is_tied_copy and not is_buffer:
            needed[name] = weight
    return needed


def expected_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a folder of this architecture has."""
    hidden_size = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden_size),
        "model.norm.weight": (hidden_size,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden_size)
    layer_shapes = {**_norm_shapes(family, config), **_attention_shapes(family, config), **_mlp_shapes(config)}
    for layer in range(config.num_hidden_layers):
        for name, shape in layer_shapes.items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    return shapes


def _norm_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    names = ["input_layernorm", "post_attention_layernorm"]
    if family.has_four_norms:
        names += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    return {f"{name}.weight": (config.hidden_size,) for name in names}


def _attention_shapes(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    size = head_size(config)
    queries = config.num_attention_heads * size
    keys = config.num_key_value_heads * size
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
        shapes[f"self_attn.{name}.weight"] = (rows, config.hidden_size)
        if name in family.biases:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (config.hidden_size, queries)
    if family.has_qk_norm:
        shapes["self_attn.q_norm.weight"] = (size,)
        shapes["self_attn.k_norm.weight"] = (size,)
    return shapes


def _mlp_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    return {
        "mlp.gate_proj.weight": (config.intermediate_size, config.hidden_size),
        "mlp.up_proj.weight": (config.intermediate_size, config.hidden_size),
        "mlp.down_proj.weight": (config.hidden_size, config.intermediate_size),
    }


def check_weights(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Weight]) -> None:
    """Raise CheckpointError where a weight is missing, unexpected, of another shape, or not dense."""
    # Missing first: a folder of another size has missing and unexpected tensors, and these say more.
    missing = sorted(expected.keys() - weights.keys())
    if missing:
        raise CheckpointError(
            f"{listed(missing)}: missing, but config.json asks for it; download the model again if it is incomplete"
        )
    unexpected = sorted(weights.keys() - expected.keys())
    if unexpected:
        raise CheckpointError(
            f"{listed(unexpected)}: cannot be exported, because llama.cpp's architecture has no such tensor: {OTHER_WAY}"
        )
    for name, shape in expected.items():
        weight = weights[name]
        if weight.shape != shape:
            raise CheckpointError(f"{name} has shape {list(weight.shape)}, but config.json asks for {list(shape)}")
        if weight.format not in DENSE_FORMATS:
            raise CheckpointError(f"{name} is stored as {weight.format}, expected {', '.join(DENSE_FORMATS)}")
