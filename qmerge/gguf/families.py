"""The architectures that can be exported, and the settings in config.json that are allowed.

The rules are those of llama.cpp's converter (conversion/llama.py, qwen.py, gemma.py and base.py in ggml-org/llama.cpp).
Settings that the converter leaves out, or that llama.cpp's graph of an architecture takes for granted, are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmerge.checkpoint.scan import Checkpoint
from qmerge.errors import CheckpointError
from qmerge.gguf.hyperparameters import head_size, rope_parameters

OTHER_WAY = "use --target bf16, then llama.cpp's convert_hf_to_gguf.py on that folder"
"""The advice for a model that cannot be exported."""

LONGEST_VALUE = 60
"""Characters of a setting in an error message: a list of layer types has hundreds."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one architecture become GGUF.

    arch            the architecture's name in GGUF (gguf.MODEL_ARCH_NAMES)
    permutes_qk     rows of q and k go from halves to pairs: transformers rotates x0 with x(d/2), llama.cpp x0 with x1
    norm_shift      added to norm weights: Gemma's layers multiply by 1 + weight
    activation      of the MLP; llama.cpp's graph has no other
    biases          layers that have a bias
    has_qk_norm     q and k are normalized in every head
    has_four_norms  norms before and after attention and MLP
    full_every      every n-th layer sees all tokens, the others a window; 0: all layers see all tokens
    """

    arch: str
    permutes_qk: bool = False
    norm_shift: float = 0.0
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    has_qk_norm: bool = False
    has_four_norms: bool = False
    full_every: int = 0


LLAMA = Family(arch="llama", permutes_qk=True)
GEMMA2 = Family(arch="gemma2", norm_shift=1.0, activation="gelu_pytorch_tanh", has_four_norms=True, full_every=2)
FAMILIES = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": LLAMA,
    "Qwen2ForCausalLM": Family(arch="qwen2", biases=("q_proj", "k_proj", "v_proj")),
    "Qwen3ForCausalLM": Family(arch="qwen3", has_qk_norm=True),
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": replace(GEMMA2, arch="gemma3", full_every=6, has_qk_norm=True),
}


def family_of(checkpoint: Checkpoint) -> Family:
    """The family of a checkpoint, by ``architectures`` in config.json.

    Raises:
        CheckpointError: no architecture is named, or one that is not in ``FAMILIES``.
    """
    architectures = checkpoint.config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        raise CheckpointError("config.json: architectures is missing: expected a list with one name")
    if name not in FAMILIES:
        raise CheckpointError(f"{name} cannot be exported, expected one of {', '.join(FAMILIES)}: {OTHER_WAY}")
    return FAMILIES[name]


def read_config(model: Path) -> Any:
    """The config as transformers reads it, with transformers' defaults for settings that config.json leaves out.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    except Exception as cause:  # transformers raises many types for an invalid config
        raise CheckpointError(f"{model}: transformers cannot read config.json: {cause}") from cause


def check_config(family: Family, config: Any) -> list[str]:
    """Refuse settings that GGUF, or llama.cpp's graph of this architecture, cannot express. Returns notes for the user.

    Raises:
        CheckpointError: the first such setting.
    """
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    expect("hidden_act", activation, family.activation)
    for name in ("attention_bias", "mlp_bias", "use_sliding_window", "use_bidirectional_attention"):
        expect(name, getattr(config, name, None) or False, False)
    _check_heads(config)
    rope = rope_parameters(config)
    _check_rope(family, config, rope)
    if family.full_every:
        _check_gemma(family, config)
        return []
    return _window_notes(config)


def expect(name: str, value: Any, expected: Any) -> None:
    """Raise CheckpointError unless a setting of config.json has the only value that can be exported."""
    if value != expected:
        shown = str(value)[:LONGEST_VALUE]
        shown_expected = str(expected)[:LONGEST_VALUE]
        raise CheckpointError(f"config.json: {name} is {shown}, expected {shown_expected}, to be exported: {OTHER_WAY}")


def _check_heads(config: Any) -> None:
    is_even = head_size(config) % 2 == 0  # rotary embeddings rotate pairs
    is_grouped = config.num_attention_heads % config.num_key_value_heads == 0
    if not is_even or not is_grouped:
        raise CheckpointError(
            f"config.json: {config.num_attention_heads} heads of size {head_size(config)} and {config.num_key_value_heads} for "
            f"keys and values: expected an even size, and a number of heads that is a multiple of that for keys and values"
        )


def _check_gemma(family: Family, config: Any) -> None:
    """Settings of Gemma that llama.cpp has in its code and reads from no key."""
    layer_types = []
    for layer in range(1, config.num_hidden_layers + 1):
        layer_types.append("full_attention" if layer % family.full_every == 0 else "sliding_attention")
    expect("layer_types", config.layer_types, layer_types)
    # The 27B models scale queries by another number, for which there is no key.
    expect("query_pre_attn_scalar", config.query_pre_attn_scalar, head_size(config))
    expect("tie_word_embeddings", config.tie_word_embeddings, True)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        # llama.cpp caps the logits of every Gemma 2, and never those of Gemma 3.
        expect(f"{name} is set", getattr(config, name, None) is not None, family.arch == "gemma2")


def _window_notes(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None)
    if not window or window >= config.max_position_embeddings:
        return []
    note = (
        f"llama.cpp has no sliding window for this architecture: past {window} tokens, every token sees all earlier ones, and "
        f"the model can answer differently"
    )
    return [note]


def _check_rope(family: Family, config: Any, parameters: dict[str, Any]) -> None:
    """Refuse scalings of rotary embeddings that GGUF's keys do not express."""
    local = (config.rope_parameters or {}).get("sliding_attention")
    if local:
        used = (local["rope_type"], local["rope_theta"])
        expect("the rope of sliding_attention", used, ("default", 10000.0))
    kind = parameters.get("rope_type", "default")
    needed_by_kind = {
        "default": set(),
        "linear": {"factor"},
        "yarn": {"factor", "original_max_position_embeddings"},
    }
    if family.arch == "llama":  # only this graph reads a factor for every frequency
        needed_by_kind["llama3"] = {
            "factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"
        }  # fmt: skip
    if kind not in needed_by_kind:
        raise CheckpointError(f"config.json: rope_type {kind} cannot be exported for {family.arch}: {OTHER_WAY}")
    needed = needed_by_kind[kind]
    is_complete = all(parameters.get(name) is not None for name in needed)
    if not is_complete or _has_other_rope_settings(parameters, needed):
        raise CheckpointError(f"config.json: rope parameters {parameters} cannot be exported: {OTHER_WAY}")


def _has_other_rope_settings(parameters: dict[str, Any], needed: set[str]) -> bool:
    """Whether there is a setting that no key stores, or another value for one that llama.cpp has in its code."""
    if parameters.get("beta_fast", 32) != 32 or parameters.get("beta_slow", 1) != 1:
        return True
    allowed = {*needed, "rope_type", "type", "rope_theta", "beta_fast", "beta_slow"}
    return any(value is not None and name not in allowed for name, value in parameters.items())
