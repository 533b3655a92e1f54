"""What a model is in GGUF: architecture, hyperparameters, and the tensors with their names, shapes and types.

The rules are those of llama.cpp's converter (conversion/llama.py, qwen.py, gemma.py and base.py in ggml-org/llama.cpp) for
the architectures in ``FAMILIES``. What they leave out, and what llama.cpp's graph for an architecture takes for granted,
is refused here by name. ``gguf`` and ``writer`` are the gguf package and its GGUFWriter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError, listed
from qmerge.types import Weight

DENSE = ("bf16", "fp16", "fp32")
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}

TWO_STEPS = "write it with --target bf16, then run llama.cpp's convert_hf_to_gguf.py on the folder"


@dataclass(frozen=True)
class Family:
    """How one architecture becomes GGUF.

    ``arch``        its name there (gguf.MODEL_ARCH_NAMES);
    ``permuted``    rows of q and k go from halves to pairs: llama.cpp rotates neighbours (x0, x1), transformers (x0, xd/2);
    ``norm_shift``  added to norm weights: Gemma's layers multiply by 1 + weight;
    ``layers``      how layers that see all tokens and layers that see a window take turns; llama.cpp knows it by heart.
    """

    arch: str
    permuted: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    four_norms: bool = False
    layers: int = 0


GEMMA2 = Family("gemma2", norm_shift=1.0, activation="gelu_pytorch_tanh", four_norms=True, layers=2)
FAMILIES = {
    "LlamaForCausalLM": Family("llama", permuted=True),
    "MistralForCausalLM": Family("llama", permuted=True),
    "Qwen2ForCausalLM": Family("qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True),
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": replace(GEMMA2, arch="gemma3", layers=6, qk_norm=True),
}


@dataclass(frozen=True)
class Planned:
    """One tensor of the file: where its values come from, and what happens to them on the way.

    ``head`` rows belong together and are permuted (0: rows stay); ``values`` where it is computed, not read.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    weight: Weight | None = None
    values: Tensor | None = None
    head: int = 0
    shift: float = 0.0


def family_of(checkpoint: Checkpoint) -> Family:
    named = checkpoint.config.get("architectures")
    name = named[0] if isinstance(named, list) and named else None
    if not isinstance(name, str):
        raise CheckpointError("config.json names no architecture: expected architectures, a list with one name")
    if name not in FAMILIES:
        raise CheckpointError(f"{name} is none of the architectures exported here ({', '.join(FAMILIES)}): {TWO_STEPS}")
    return FAMILIES[name]


def read_config(model: Path) -> Any:
    """The config as transformers reads it, so that what config.json leaves out has the value that the model uses."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    except Exception as cause:  # whatever the stock library raises, it means that it does not read it
        raise CheckpointError(f"transformers does not read config.json of {model}: {cause}") from cause


def check_config(family: Family, config: Any) -> list[str]:
    """Refuse what GGUF or llama.cpp's graph for this architecture has no place for; returns notes."""
    found = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    expect("hidden_act", found, family.activation)
    for name in ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"):
        expect(name, getattr(config, name, None) or False, False)
    if head_dim(config) % 2 or config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"config.json: {config.num_attention_heads} heads of size {head_dim(config)}, {config.num_key_value_heads} for keys "
            f"and values: expected an even size, and as many heads for every key-value head"
        )
    rope(family, config)
    if family.layers:
        pattern = ["full" if (i + 1) % family.layers == 0 else "sliding" for i in range(config.num_hidden_layers)]
        expect("layer_types", config.layer_types, [f"{kind}_attention" for kind in pattern])
        expect("query_pre_attn_scalar", config.query_pre_attn_scalar, head_dim(config))
        expect("tie_word_embeddings", config.tie_word_embeddings, True)
        for name in ("attn_logit_softcapping", "final_logit_softcapping"):  # llama.cpp caps in Gemma 2 in any case
            expect(f"{name} is set", getattr(config, name, None) is not None, family.arch == "gemma2")
    elif (window := getattr(config, "sliding_window", None)) and window < config.max_position_embeddings:
        return [f"llama.cpp has no sliding window here: past {window} tokens, a token sees all those before it"]
    return []


def expect(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise CheckpointError(
            f"config.json: {name} is {str(found)[:60]}, expected {str(expected)[:60]}, all that is exported here: {TWO_STEPS}"
        )


# --- hyperparameters -------------------------------------------------------------------------------------------------


def head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rope(family: Family, config: Any) -> dict[str, Any]:
    """The rope parameters of the layers that see all tokens; refuses scalings that GGUF's keys do not express."""
    found = config.rope_parameters or {}
    if local := found.get("sliding_attention"):
        expect("the rope of sliding_attention", (local["rope_type"], local["rope_theta"]), ("default", 10000.0))
    parameters = dict(found.get("full_attention", found))
    kind = parameters.get("rope_type", "default")
    known = {"default": set(), "linear": {"factor"}, "yarn": {"factor", "original_max_position_embeddings"}}
    if family.arch == "llama":  # the one whose graph reads the factors of every frequency
        known["llama3"] = {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"}
    if kind not in known:
        raise CheckpointError(f"config.json: rope_type {kind} is not exported here for {family.arch}: {TWO_STEPS}")
    allowed = {*known[kind], "rope_type", "type", "rope_theta", "beta_fast", "beta_slow"}
    odd = sorted(name for name in parameters if name not in allowed and parameters[name] is not None)
    missing = sorted(name for name in known[kind] if parameters.get(name) is None)
    if odd or missing or parameters.get("beta_fast", 32) != 32 or parameters.get("beta_slow", 1) != 1:
        raise CheckpointError(f"config.json: rope parameters {parameters} are not exported here: {TWO_STEPS}")
    return parameters


def rope_factors(parameters: Mapping[str, Any], size: int) -> Tensor | None:
    """float32 [size / 2]: what each frequency is divided by, for Llama 3's scaling (None for any other).

    High frequencies stay, low ones are divided by ``factor``, those between are interpolated by their wavelength
    (transformers, modeling_rope_utils.py; llama.cpp reads them from ``rope_freqs.weight``).
    """
    if parameters.get("rope_type") != "llama3":
        return None
    wavelengths = 2 * math.pi * parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factor, low, high = (parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = parameters["original_max_position_embeddings"] / wavelengths
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors


def add_metadata(
    gguf: Any, writer: Any, name: str, family: Family, config: Any, plan: list[Planned], type: str
) -> None:  # fmt: skip
    """Every key that llama.cpp's converter writes for these architectures, but the tokenizer's."""
    writer.add_type("model")
    writer.add_name(name)
    count = sum(math.prod(t.shape) for t in plan)
    writer.add_size_label(gguf.size_label(count, count, 0, 0))
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(int(gguf.LlamaFileType[FILE_TYPES[type]]))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    if family.layers:
        writer.add_sliding_window(config.sliding_window)
    if config_value := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(config_value)
    if config_value := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config_value)
    add_rope(gguf, writer, rope(family, config))


def add_rope(gguf: Any, writer: Any, parameters: Mapping[str, Any]) -> None:
    writer.add_rope_freq_base(parameters["rope_theta"])
    kind = parameters.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])


# --- tensors ---------------------------------------------------------------------------------------------------------


def expected_tensors(family: Family, config: Any) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that a folder of this architecture has."""
    width, hidden, size = config.hidden_size, config.intermediate_size, head_dim(config)
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if family.four_norms else []
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name in norms}
    for name, rows in {"q_proj": queries, "k_proj": keys, "v_proj": keys}.items():
        layer[f"self_attn.{name}.weight"] = (rows, width)
        if name in family.biases:
            layer[f"self_attn.{name}.bias"] = (rows,)
    layer["self_attn.o_proj.weight"] = (width, queries)
    layer |= {f"self_attn.{name}_norm.weight": (size,) for name in ("q", "k") if family.qk_norm}
    layer |= {"mlp.gate_proj.weight": (hidden, width), "mlp.up_proj.weight": (hidden, width)}
    layer["mlp.down_proj.weight"] = (width, hidden)
    ends = {"model.embed_tokens.weight": (config.vocab_size, width), "model.norm.weight": (width,)}
    if not config.tie_word_embeddings:
        ends["lm_head.weight"] = (config.vocab_size, width)
    layers = range(config.num_hidden_layers)
    return ends | {f"model.layers.{i}.{name}": shape for i in layers for name, shape in layer.items()}


def plan_tensors(gguf: Any, checkpoint: Checkpoint, family: Family, config: Any, type: str) -> list[Planned]:
    """Every tensor of the file, in the order in which the folder has them.

    Raises:
        CheckpointError: a tensor is missing, left over, of another shape, or not dense.
    """
    expected = expected_tensors(family, config)
    # Old checkpoints carry a buffer that is computed from the config, and some a head that is the embedding again.
    unused = {name for name in checkpoint.weights if name.endswith(".rotary_emb.inv_freq")}
    unused |= {"lm_head.weight"} if config.tie_word_embeddings else set()
    weights = {name: weight for name, weight in checkpoint.weights.items() if name not in unused}
    check_tensors(expected, weights)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.arch.upper()], config.num_hidden_layers)
    plan = []
    for name, weight in weights.items():
        head = head_dim(config) if family.permuted and name.endswith(("q_proj.weight", "k_proj.weight")) else 0
        shift = family.norm_shift if name.endswith("norm.weight") else 0.0
        kind = type_of(weight.shape, type)
        new = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert new is not None, name
        plan.append(Planned(new, weight.shape, kind, weight, head=head, shift=shift))
    factors = rope_factors(rope(family, config), head_dim(config))
    if factors is not None:
        plan.insert(0, Planned("rope_freqs.weight", tuple(factors.shape), "f32", values=factors))
    return plan


def check_tensors(expected: Mapping[str, tuple[int, ...]], weights: Mapping[str, Weight]) -> None:
    missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{listed(missing)}: in no file, but config.json asks for it; is the folder whole?")
    if extra:
        raise CheckpointError(f"{listed(extra)}: not exported here, the architecture has no such tensor: {TWO_STEPS}")
    for name, shape in expected.items():
        if weights[name].shape != shape:
            raise CheckpointError(f"{name} has shape {list(weights[name].shape)}, config.json says {list(shape)}")
        if weights[name].format not in DENSE:
            raise CheckpointError(f"{name} is stored as {weights[name].format}, expected one of {', '.join(DENSE)}")


def type_of(shape: tuple[int, ...], type: str) -> str:
    """llama.cpp computes with float32 vectors, and Q8_0 has blocks of 32 values that do not straddle rows."""
    if len(shape) < 2:
        return "f32"
    return "f16" if type == "q8_0" and shape[-1] % 32 else type


def fallback_notes(plan: list[Planned], type: str) -> list[str]:
    fallen = [t.name for t in plan if len(t.shape) > 1 and t.type != type]
    return [f"F16, not {type.upper()}, for {listed(fallen)}: rows are no multiple of 32 long"] if fallen else []


def qtype(gguf: Any, name: str) -> Any:
    return gguf.GGMLQuantizationType[name.upper()]


def nbytes_of(gguf: Any, t: Planned) -> int:
    entries, size = gguf.GGML_QUANT_SIZES[qtype(gguf, t.type)]
    return math.prod(t.shape) // int(entries) * int(size)
