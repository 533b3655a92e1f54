"""The settings of adapter_config.json that are PEFT's own options, and those that are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any


def text_setting(config: Mapping[str, Any], name: str) -> str:
    """A setting that should be text; empty where it is missing or something else."""
    value = config.get(name)
    return value.strip() if isinstance(value, str) else ""


def release(name: str) -> tuple[int, ...]:
    """The numbers that a version begins with: ``0.21.2.dev0@1a2b3c`` → (0, 21, 2). Empty where it begins with text."""
    match = re.match(r"\d+(?:\.\d+)*", name)
    return tuple(map(int, match[0].split("."))) if match else ()


LORA_OPTIONS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_config", "megatron_core", "trainable_token_indices", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "use_dora", "use_qalora", "qalora_group_size", "layer_replication", "runtime_config",
    "lora_bias", "target_parameters", "arrow_config", "ensure_weight_tying", "use_bdlora", "kasa_config",
    "monteclora_config", "velora_config", "alora_invocation_tokens",
}  # fmt: skip
"""Fields of PEFT 0.21's LoraConfig (a test compares them). Importing PEFT to read them takes seconds."""


def other_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not options of the installed PEFT: notes of training tools, or options of a newer PEFT."""
    kind = text_setting(config, "peft_type").upper()
    known = LORA_OPTIONS if kind in ("LORA", "") else _peft_options(kind)
    if not known:
        return {}
    return {name: value for name, value in config.items() if name not in known}


def _peft_options(kind: str) -> frozenset[str]:
    """Options of a kind of adapter in the installed PEFT; empty for an unknown kind."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType

    if kind not in PeftType.__members__ or PeftType[kind] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        return frozenset()
    return frozenset(field.name for field in fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]))
