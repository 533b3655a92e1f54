"""llama.cpp's named mixes: which tensor of a GGUF file has which type. (Of build 11739; older ones count layers differently.)

A mix has a basic type; tensors that matter more have a larger one. Rows that are not a multiple of a type's block get another
type. Norms, biases and a few small tensors are not quantized.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FILE_TYPES = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q3_k_s": 11,
    "q3_k_m": 12,
    "q3_k_l": 13,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q5_k_s": 16,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
    "bf16": 32,
}
"""Every mix → its number in ``general.file_type`` (``gguf.LlamaFileType``)."""

DENSE_TYPES = ("F32", "F16", "BF16")

# A row is a whole number of blocks of 32 or 256 values.
LARGE_BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS")
SMALL_BLOCK, LARGE_BLOCK = 32, 256

# Types with blocks of 256 → those that replace them in shorter rows.
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}

# Last fallback, where not even blocks of 32 fit.
UNUSUAL_SHAPE = "F16"

# Parts of the names of tensors that are never quantized: norms, routers, and matrices that are small or sensitive.
NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
    "shortconv.conv.weight", "indexer.k_proj.weight", "indexer.q_proj.weight", "time_mix_first.weight", "time_mix_w0.weight",
    "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_v0.weight", "time_mix_v1.weight", "time_mix_v2.weight",
    "time_mix_a0.weight", "time_mix_a1.weight", "time_mix_a2.weight", "time_mix_g1.weight", "time_mix_g2.weight",
    "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight", "attn_rel_b.weight",
    ".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger", "a.rvq.codebook",
    "mm.a.code_embd",
)  # fmt: skip
NEVER_QUANTIZED_NAMES = ("position_embd.weight", "token_types.weight")

# The converter writes these as float32; other tensors that are not quantized have the 16-bit type of the file.
ALWAYS_FLOAT32 = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "altup_correct_coef.weight",
    "altup_predict_coef.weight", "ssm_conv1d", "shortconv.conv.weight", "indexer.proj.weight", "time_mix_first.weight",
    "time_mix_w1.weight", "time_mix_w2.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight",
    "time_mix_lerp_fused.weight", "posnet.",
)  # fmt: skip

EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
OUTPUT = "output.weight"
DOWN = "ffn_down"
ATTENTION_VALUES = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight")

# Architecture → number of layers of the models that llama.cpp calls 70B. Their projections to values are small.
LARGE_MODELS = {"llama": 80, "qwen2": 80, "deci": 80, "jais2": 68}

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What the choice of types depends on, besides names and shapes.

    Attributes:
        arch: ``general.architecture``.
        layers: ``block_count``.
        heads: ``attention.head_count``, of the first layer if layers differ.
        kv_heads: ``attention.head_count_kv``, of the first layer.
        experts: ``expert_count``; 0 without experts.
        has_importance: whether scales are weighted by calibration (llama.cpp: an importance matrix).
    """

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0
    has_importance: bool = False

    @property
    def heads_per_kv(self) -> int:
        """Heads that share keys and values; 0 where the first layer has none."""
        if not self.kv_heads:
            return 0
        return self.heads // self.kv_heads

    @property
    def is_large(self) -> bool:
        """Whether llama.cpp calls it 70B."""
        if self.arch == "llama" and self.heads == self.kv_heads:
            return False
        return self.layers == LARGE_MODELS.get(self.arch)


def tensor_types(mix: str, shapes: Mapping[str, Shape], model: Model, *, dense_type: str = "F16") -> dict[str, str]:
    """The type of every tensor of a file, by name.

    Args:
        mix: a key of ``FILE_TYPES``.
        shapes: name in the file → shape of every tensor, the length of a row last. All are needed: some rules count them.
        dense_type: type of tensors that a mix neither quantizes nor stores as float32.
    """
    basic = basic_type(mix)
    is_dense = basic in DENSE_TYPES
    rules = Rules(mix=mix, basic=basic, model=model, tied=OUTPUT not in shapes, values=value_positions(shapes))
    types = {}
    downs = 0
    for name in sorted(shapes, key=file_order):
        shape = shapes[name]
        if is_dense:
            types[name] = unquantized_type(name, shape, basic)
        elif not is_quantized(name, shape):
            types[name] = unquantized_type(name, shape, dense_type)
        else:
            types[name] = fitting_type(rules.type_of(name, shape[-1], downs), shape[-1])
            downs += DOWN in name
    return {name: types[name] for name in shapes}


def basic_type(mix: str) -> str:
    """The type of most tensors of a mix: ``q4_k_m`` → ``Q4_K``."""
    return re.sub(r"_K_[SML]$", "_K", mix.upper())


def file_order(name: str) -> tuple[int, str]:
    """Sort key of a tensor's name: layer by layer, as llama.cpp goes through them."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def value_positions(names: Iterable[str]) -> dict[str, int]:
    """Names of projections to attention values → their position among them."""
    values = [name for name in sorted(names, key=file_order) if is_value(name)]
    return {name: position for position, name in enumerate(values)}


def is_value(name: str) -> bool:
    """Whether a tensor projects to attention values (alone, or to queries and keys as well)."""
    return any(part in name for part in ATTENTION_VALUES)


def is_quantized(name: str, shape: Shape) -> bool:
    """Whether a mix of block types quantizes this tensor."""
    # A matrix of one row counts as a vector.
    is_vector = len(shape) < 2 or all(size == 1 for size in shape[:-1])
    if is_vector or not name.endswith("weight") or name in NEVER_QUANTIZED_NAMES:
        return False
    return not any(part in name for part in NEVER_QUANTIZED)


def unquantized_type(name: str, shape: Shape, dense_type: str) -> str:
    """The type of a tensor that is not quantized, as llama.cpp's converter writes it."""
    is_vector = len(shape) < 2
    if is_vector or not name.endswith(".weight") or name in NEVER_QUANTIZED_NAMES:
        return "F32"
    if any(part in name for part in ALWAYS_FLOAT32):
        return "F32"
    return dense_type


def fitting_type(block_type: str, columns: int) -> str:
    """The type, or the one that replaces it in rows of this length."""
    if block_type in LARGE_BLOCKS and columns % LARGE_BLOCK:
        block_type = FALLBACKS[block_type]
    if block_type not in LARGE_BLOCKS and columns % SMALL_BLOCK:
        return UNUSUAL_SHAPE
    return block_type


def uses_more_bits(layer: int, layers: int) -> bool:
    """Whether a layer is among those that a ``_m`` mix spends more bits on: the first and last eighth, and every third."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


@dataclass(frozen=True, kw_only=True)
class Rules:
    """The types of one mix in one model, before rows that do not fit are considered.

    Attributes:
        mix: a key of ``FILE_TYPES``.
        basic: its basic type.
        model: the model.
        tied: whether the input embedding is the output embedding, too.
        values: position of every projection to attention values.
    """

    mix: str
    basic: str
    model: Model
    tied: bool
    values: Mapping[str, int]

    def type_of(self, name: str, columns: int, downs: int) -> str:
        """The type of a tensor that is quantized.

        Args:
            columns: length of a row.
            downs: number of ``ffn_down`` tensors before it.
        """
        if name == OUTPUT or (self.tied and name in EMBEDDINGS):
            return self.output_type(columns)
        if name in EMBEDDINGS:
            return self.basic
        if name in self.values:
            return self.value_type(self.values[name])
        if "attn_k.weight" in name and self.model.experts == 8:
            return "Q8_0"
        if "attn_output.weight" in name:
            return self.attention_output_type()
        if DOWN in name:
            # With experts, a layer may have several of them.
            layer = file_order(name)[0] if self.model.experts > 1 else downs
            return self.down_type(layer)
        return self.basic

    def output_type(self, columns: int) -> str:
        """Type of the output embedding."""
        block = LARGE_BLOCK if self.basic in LARGE_BLOCKS else SMALL_BLOCK
        if self.model.arch == "falcon" or columns % block or self.basic == "Q8_0":
            return "Q8_0"
        return "Q6_K"

    def value_type(self, position: int) -> str:
        """Type of a projection to attention values, which is small and sensitive."""
        if self.model.experts == 8:
            return "Q8_0"
        chosen = self._value_type(position)
        if self.model.is_large and chosen in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return chosen

    def _value_type(self, position: int) -> str:
        is_shared = self.model.heads_per_kv >= 4
        if self.mix == "q2_k":
            return "Q4_K" if is_shared else "Q3_K"
        if self.mix == "q3_k_m":
            return "Q5_K" if position < 2 else "Q4_K"
        if self.mix == "q3_k_l" or (self.mix == "q4_k_s" and position < 4):
            return "Q5_K"
        if self.mix in ("iq4_nl", "iq4_xs") and is_shared:
            return "Q5_K"
        if self.mix in ("q4_k_m", "q5_k_m") and uses_more_bits(position, len(self.values)):
            return "Q6_K"
        return self.basic

    def attention_output_type(self) -> str:
        """Type of the projection of attention's output."""
        if self.model.arch == "falcon":
            return "Q4_K" if self.mix == "q3_k_l" else self.basic
        if self.model.experts == 8:
            larger = ("q2_k", "q3_k_s", "q3_k_m", "iq4_nl", "q4_k_s", "q4_k_m", "iq4_xs")
            return "Q5_K" if self.mix in larger else self.basic
        return {"q2_k": "Q3_K", "q3_k_m": "Q4_K", "q3_k_l": "Q5_K"}.get(self.mix, self.basic)

    def down_type(self, layer: int) -> str:
        """Type of an MLP's last projection."""
        layers = self.model.layers
        is_falcon = self.model.arch == "falcon"
        has_more_bits = uses_more_bits(layer, layers)
        if self.mix == "q2_k":
            return "Q3_K"
        if self.mix == "q3_k_m":
            if layer < layers // 16:
                return "Q5_K"
            return "Q3_K" if is_falcon and not has_more_bits else "Q4_K"
        if self.mix == "q3_k_l":
            return "Q4_K" if is_falcon else "Q5_K"
        if self.mix == "q4_k_m" and is_falcon:
            if layer < layers // 16:
                return "Q6_K"
            return "Q5_K" if has_more_bits else "Q4_K"
        if self.mix in ("q4_k_m", "q5_k_m") and has_more_bits:
            return "Q6_K"
        if layer < layers // 8:
            return self._early_down_type()
        return self.basic

    def _early_down_type(self) -> str:
        """Type of ``ffn_down`` in the first eighth of the layers."""
        has_importance = self.model.has_importance
        if self.mix in ("iq4_nl", "iq4_xs") and not has_importance:
            return "Q5_K"
        if self.mix == "q4_k_s" and self.model.arch != "falcon":
            return "Q5_K"
        if has_importance:
            return {"q4_0": "Q4_1", "q5_0": "Q5_1"}.get(self.mix, self.basic)
        return self.basic
