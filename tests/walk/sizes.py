"""A tiny config of any architecture: the defaults of its config class, scaled down by the names of their fields.

The same rules serve all architectures; ``exceptions`` has the fields that depend on each other in their own way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from .exceptions import EXCEPTIONS, STARTS

RULES: tuple[tuple[int, tuple[str, ...]], ...] = (
    (99, (r"num_feat_extract_layers",)),  # as many as conv_dim has entries
    # tokens
    (3, (r"(.*_)?(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_bos|forced_eos)_token_id",)),
    (95, (r".*_token_(id|index)", r".*_token_idx", r".*_index", r".*token_ids?")),
    (96, (
        r"(.*_)?(vocab_size|n_tokens|vocabulary_size|vocab)(_.*)?", r"n_vocab", r"codebook_size", r"num_embeddings",
    )),
    (64, (
        r"max_((source|target|position|text|audio|seq|length)_)?(positions|position_embeddings|length|seq_len)",
        r"n_positions", r"n_ctx", r"max_seq_length", r"num_position_embeddings", r"position_embedding_size",
        r"model_max_length",
    )),
    # heads
    (16, (r"qk_head_dim",)),  # with and without rope, 8 each
    (2, (r"(.*_)?(num_key_value_heads|num_kv_heads|n_head_kv|kv_n_heads|num_query_groups|multi_query_group_num)",)),
    (8, (r"(.*_)?head_?dim", r".*_per_head", r"d_kv", r"d_head", r"kv_channels", r"headdim")),
    (4, (
        r"rotary_dim", r"(.*_)?(num_|n_)?(attention_|attn_|query_|q_|key_|value_|index_|mamba_)?heads?",
        r"(.*_)?(num_attention_heads|num_heads|n_heads|n_head|attention_heads|num_\w*_heads)(_.*)?",
    )),
    # experts
    (1, (r"topk_groups?",)),
    (2, (
        r"num_experts_per_tok(en)?", r"(.*_)?top_?k(_.*)?", r"num_selected_experts", r"moe_k", r"experts_per_token",
    )),
    (1, (
        r"n_groups?", r"num_expert_groups?", r"o_groups", r"mamba_n_?groups", r"num_groups",
        r"(n_|num_)shared_experts",
    )),
    (4, (r"(.*_)?experts?", r"(n_|num_)\w*experts(_.*)?")),
    # ranks and layers
    (16, (r"(.*_)?rank", r".*_latent_(size|dim)")),
    (1, (r"first_k_dense_replace", r"moe_layer_start_index", r"num_dense_layers", r"num_nextn_predict_layers")),
    (0, (r"num_kv_shared_layers", r"num_kv_reused_layers")),
    (2, (r"(.*_)?(num_|n_)?(\w+_)?(layers?|blocks?|depths?)(_count)?",)),
    # images
    (32, (r"image_size", r"(.*_)?img_size", r"input_size", r"image_(height|width)")),
    (8, (r"(.*_)?patch_size",)),
    # widths
    (16, (
        r"(n|num)_filters", r"d_latents", r"context_size", r"num_latents", r"lru_width", r"(.*_)?num_mel_bins",
        r"conv_dim", r"(ssm_)?state_size", r"mamba_d_state",
    )),
    (64, (
        r".*(intermediate|ffn|inner|mlp|feed_?forward|ff)(_hidden)?_?(size|dim|channels|layers_dim)(_.*)?", r"d_ff",
        r"d_inner", r"n_inner",
    )),
    (32, (
        r"(.*_)?(hidden|embed(ding)?|model|(out|in)(put)?|proj(ection)?|text|vision|kv|channel)_?(size|dims?|width|features)(_.*)?",
        r"(.*_)?(text|vision|out|in|kv)_?hidden_size(_.*)?",
        r"(.*_)?(d_model|n_embd|dim|width|hidden|emb_dim)(_.*)?",
    )),
    (8, (r"(mamba_)?chunk_size", r".*sliding_window", r"local_attention", r"attention_window", r"window_size")),
)  # fmt: skip
"""The largest value of a field, and patterns of names of such fields; the first match counts."""

LEFT_OUT = (
    "id2label", "label2id", "transformers_version", "out_features", "out_indices", "stage_names", "quantization_config",
)  # fmt: skip
"""Fields that follow from others, whose defaults would contradict these; and that a model was stored quantized."""

LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "depth", "decoder_layers")
PER_LAYER = re.compile(r".*layers?_(block_)?types?")


def tiny_config(model_type: str) -> PretrainedConfig:
    """The config of a model of this type with a width of 32, 2 layers or more (all kinds) and a vocabulary of 96."""
    _, arguments = STARTS.get(model_type, ("", {}))
    default = CONFIG_MAPPING[model_type](**deepcopy(arguments))
    return type(default).from_dict(scaled(default.to_dict()))


def scaled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a config with smaller sizes, sub-configs included."""
    result: dict[str, Any] = {}
    count, chosen = _chosen_layers(values)
    for name, value in values.items():
        if name in LEFT_OUT:
            continue
        if name == "per_layer_config":
            result[name] = _of_layers(value, chosen)
        elif isinstance(value, dict):
            result[name] = scaled(value) if "model_type" in value else deepcopy(value)
        elif isinstance(value, list) and chosen and len(value) == count:
            result[name] = [_smaller(name, value[layer]) for layer in chosen]
        elif isinstance(value, list):
            result[name] = [_smaller(name.removesuffix("s"), entry) for entry in value]
        elif name in LAYERS and chosen and value == count:
            result[name] = len(chosen)
        else:
            result[name] = _smaller(name, value)
    if "kv_lora_rank" in values:  # each head has keys and values of its own, made of a common latent vector
        result["num_key_value_heads"] = result["num_attention_heads"]
    _, fields = EXCEPTIONS.get(str(values.get("model_type")), ("", {}))
    return {**result, **deepcopy(fields)}


def _of_layers(by_layer: Mapping[str, Any], chosen: list[int]) -> dict[str, Any]:
    """Fields that single layers have in another size, for the chosen layers by their new numbers."""
    of_layer = {int(layer): fields for layer, fields in by_layer.items()}
    return {str(new): scaled(of_layer[old]) for new, old in enumerate(chosen) if old in of_layer}


def _smaller(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    for most, patterns in RULES:
        if any(re.fullmatch(pattern, name) for pattern in patterns):
            smaller = min(value, most)
            # Three heads, as Swin has, do not divide the width.
            return 2 if smaller == 3 and "head" in name else smaller
    return value


def _chosen_layers(values: Mapping[str, Any]) -> tuple[int, list[int]]:
    """The number of layers, and those that stay: the first of each kind, and at least two. No layers: (0, [])."""
    lists = [value for name, value in values.items() if isinstance(value, list) and PER_LAYER.fullmatch(name)]
    if not lists:
        counts = [values[name] for name in LAYERS if isinstance(values.get(name), int)]
        return (counts[0], list(range(min(counts[0], 2)))) if counts else (0, [])
    count = len(lists[0])
    kinds = list(zip(*(kinds for kinds in lists if len(kinds) == count), strict=True))
    return count, sorted({kinds.index(kind) for kind in kinds} | {0, min(1, count - 1)})
