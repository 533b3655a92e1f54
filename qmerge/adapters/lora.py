"""LoRA, rsLoRA, DoRA and peft's variants, with trained biases, token rows and modules (arXiv 2106.09685, 2402.09353)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.base import AdapterKind, Changes
from qmerge.adapters.updates import initializations, variants
from qmerge.adapters.updates.experts import Parameter, check_complete, stacked, targeted
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, LoraUpdate, OwnBaseUpdate, TokenRowsUpdate
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Replacement, Update

KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
"""``….lora_A.weight``, with the adapter's name in between where peft did not take it out."""

TOKENS = ".token_adapter.trainable_tokens_delta"

LARGEST_ALPHA = 1e6

# Options that change what a correct merge is, with the values that leave it plain; more in variants.py and initializations.py.
PLAIN: dict[str, tuple[Any, ...]] = {
    "nvfp4_merge_aware": (None, False),  # axolotl: trained through NVFP4's own rounding
}


class LoraKind(AdapterKind):
    """``peft_type`` LORA, read without peft."""

    peft_types = ("LORA",)

    def check_folder(self, folder: Path, config: Mapping[str, Any]) -> None:
        initializations.check_folder(folder, config)

    def updates(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None) -> Changes:
        return updates(config, tensors, names)


KIND = LoraKind()


def updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None) -> Changes:
    """``AdapterKind.updates`` for LoRA. ``names`` are needed for ``target_parameters`` only.

    Raises:
        AdapterError: an option or tensor that is not handled; half a pair; a rank that is not the config's.
    """
    refuse_options(config)
    variants.refuse(config, list(tensors))
    parts, unused, others = sorted_out(config, tensors)
    found: Changes = {}
    targets = {module: parameter for module in parts if (parameter := targeted(module, config, names))}
    if config.get("target_parameters") and not targets:
        raise AdapterError(
            f"adapter_config.json has target_parameters={listed(config['target_parameters'])}, but no LoRA in the file belongs to "
            f"one of the base's. Is this the base that the adapter was trained on?"
        )
    check_complete(targets, config, names)
    for module, own in parts.items():
        if module in targets:
            place(found, *of_parameter(targets[module], own, config, tensors))
        else:
            found |= of_module(module, own, unused.get(module, []), config, tensors)
    for name, spellings in spelled(others, tensors).items():
        place(found, *of_other(name, spellings, found, config, tensors))
    check_saved_modules(found, config)
    return found


def sorted_out(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, str]], dict[str, list[str]], list[str]]:
    """Names of tensors: by module and part of a LoRA; by module, where only training needs them; all others."""
    parts: dict[str, dict[str, str]] = {}
    unused: dict[str, list[str]] = {}
    others: list[str] = []
    for name in sorted(tensors):
        match, module = KEY.fullmatch(name), variants.training_only(name, config)
        if match:
            add_part(parts.setdefault(match["module"], {}), match, name)
        elif module:
            unused.setdefault(module, []).append(name)
        else:
            others.append(name)
    return parts, unused, others


def spelled(names: list[str], tensors: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Name of a tensor → the names that it has in the file. An embedding that was resized and trained whole is saved three
    times (peft 0.21): by its name, as ``….modules_to_save.weight``, and untrained as ``….original_module.weight``.

    Raises:
        AdapterError: two spellings of one tensor differ.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        if ".original_module." not in name:
            found.setdefault(name.replace(".modules_to_save.", "."), []).append(name)
    for name, spellings in found.items():
        if not all(torch.equal(tensors[spellings[0]], tensors[other]) for other in spellings[1:]):
            raise AdapterError(f"{listed(spellings)} are one tensor, {name}, but differ: which one was trained?")
    for name in names:
        if ".original_module." in name:
            found.setdefault(name.replace(".original_module.", "."), []).append(name)
    return found


def add_part(names: dict[str, str], match: re.Match[str], name: str) -> None:
    part = "lora_B.bias" if match["leaf"] == "bias" else match["part"]
    if part in names:
        raise AdapterError(
            f"{name!r} and {names[part]!r} are both {part} of {match['module']}: "
            f"the file holds several adapters; save one of them by itself"
        )
    names[part] = name


def place(found: Changes, weight: str, change: Update | Replacement, names: list[str]) -> None:
    if weight in found:
        raise AdapterError(f"{listed(names)}: {weight} is changed by {listed(found[weight][1])} already")
    found[weight] = (change, names)


def of_module(
    module: str, names: Mapping[str, str], unused: list[str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Changes:
    """The LoRA of one module, and of its bias. ``unused``: tensors of it that only training needs."""
    embedding = any(part.startswith("lora_embedding") for part in names)
    halves = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    missing = [half for half in halves if half not in names]
    if missing:
        has = halves[1 - halves.index(missing[0])]
        raise AdapterError(f"{module} has {has} but no {missing[0]}: the adapter is incomplete")
    A, B = (tensors[names[half]] for half in halves)
    rank, scale = rank_and_scale(module, config)
    update = of_layer(module, A, B, rank, scale, names, config, tensors)
    used = sorted([*(name for part, name in names.items() if part != "lora_B.bias"), *unused])
    found: Changes = {f"{module}.weight": (update, used)}
    if "lora_B.bias" in names:
        bias_O = tensors[names["lora_B.bias"]]
        found[f"{module}.bias"] = (AddUpdate(bias_O.flatten()[None] * scale, scale), [names["lora_B.bias"]])
    return found


def of_layer(
    module: str, A: Tensor, B: Tensor, rank: int, scale: float,
    names: Mapping[str, str], config: Mapping[str, Any], tensors: Mapping[str, Tensor],
) -> Update:  # fmt: skip
    """What the LoRA of one module does to its weight."""
    embedding = "lora_embedding_A" in names
    lora = _lora(module, A, B, rank, scale, config, embedding)
    start = (
        None if embedding else initializations.start_of(config)
    )  # peft starts embeddings as usual, whatever the config says
    if "lora_diag" in names:
        lora, start = _kasa(module, lora, tensors[names["lora_diag"]], config), "kasa"
    if start and (embedding or A.ndim > 2):
        raise AdapterError(f"{module}: peft has {start} on linear layers only")
    update: Update = lora
    if "lora_magnitude_vector" in names:
        update = _dora(module, lora, tensors[names["lora_magnitude_vector"]], config, embedding)
    elif config.get("use_dora"):
        raise AdapterError(
            f"{module} has no lora_magnitude_vector, but adapter_config.json says use_dora: it is incomplete"
        )
    if start is None:
        return update
    if not isinstance(update, LoraUpdate if start == "kasa" else LoraUpdate | DoraUpdate):
        raise AdapterError(
            f"{module}: peft has no layer that combines {start} with the other variant in adapter_config.json"
        )
    return initializations.ChangedBaseUpdate(start, update)


def of_parameter(
    parameter: Parameter, parts: Mapping[str, str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, Update, list[str]]:
    """The LoRA of a parameter that peft wraps by itself: plain, of one matrix or of a stack (peft/tuners/lora/layer.py,
    ParamWrapper). Patterns are matched on the parameter's name."""
    used = sorted(parts.values())
    if parts.keys() != {"lora_A", "lora_B"} or initializations.start_of(config):
        raise AdapterError(
            f"{parameter.name} is one of target_parameters, where peft has plain LoRA only: found {listed(used)} with "
            f"init_lora_weights={config.get('init_lora_weights', True)!r}"
        )
    rank, scale = rank_and_scale(parameter.name, config)
    update = stacked(parameter, tensors[parts["lora_A"]], tensors[parts["lora_B"]], rank, scale, config)
    return parameter.name, update, used


def of_other(
    name: str, spellings: list[str], found: Changes, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, Update | Replacement, list[str]]:
    """What a tensor does that belongs to no LoRA: trained rows, biases, whole modules."""
    values = tensors[spellings[0]]
    if name.endswith(TOKENS):
        module = name.removesuffix(TOKENS)
        return f"{module}.weight", TokenRowsUpdate(token_indices(module, config), values), spellings
    plain = name.replace(".base_layer.", ".")
    if plain.endswith(".bias") and config.get("bias") in ("all", "lora_only"):
        return plain, Replacement(values), spellings
    if name.endswith(".base_layer.weight") and plain in found:  # an embedding that LoRA was put on, as it was then
        update, names = found.pop(plain)
        assert not isinstance(update, Replacement)
        return plain, OwnBaseUpdate(values, update), [*names, *spellings]
    if is_saved_module(plain, config) or is_embedding(plain):
        return plain, Replacement(values), spellings
    raise AdapterError(
        f"adapter tensor {name!r} is no lora_A or lora_B of a linear layer or embedding, and adapter_config.json names it "
        f"neither in modules_to_save nor by its bias option: this version cannot merge it"
    )


def is_saved_module(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the tensor belongs to a module of ``modules_to_save``: peft compares the ends of modules' names."""
    parts = name.split(".")
    above = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(module.endswith(saved) for module in above for saved in config.get("modules_to_save") or [])


def is_embedding(name: str) -> bool:
    """peft saves embeddings whole when their size changed, whatever the config says (``save_embedding_layers``)."""
    return name.rpartition(".")[0].rpartition(".")[2] in (
        "lm_head",
        "embed_tokens",
        "wte",
        "embed_out",
        "embed_in",
        "wpe",
    )


def check_saved_modules(found: Changes, config: Mapping[str, Any]) -> None:
    """Everything that the config says was trained beside LoRA is there."""
    for option, kind in (("lora_bias", AddUpdate), ("trainable_token_indices", TokenRowsUpdate)):
        if config.get(option) and not any(isinstance(change, kind) for change, _ in found.values()):
            raise AdapterError(
                f"adapter_config.json has {option}={config[option]!r}, but no tensor of it is in the file"
            )
    for saved in config.get("modules_to_save") or []:
        if not any(is_saved_module(name, {"modules_to_save": [saved]}) for name in found):
            raise AdapterError(
                f"adapter_config.json lists {saved!r} in modules_to_save, but no tensor of it is in the file"
            )


def token_indices(module: str, config: Mapping[str, Any]) -> list[int]:
    """``trainable_token_indices``: a list for the input embedding, or lists by the end of the module's name."""
    said = config.get("trainable_token_indices")
    found = (
        next((v for k, v in said.items() if f".{module}".endswith(f".{k}")), None) if isinstance(said, dict) else said
    )
    if not isinstance(found, list) or not all(isinstance(index, int) and index >= 0 for index in found):
        raise AdapterError(
            f"{module} has trained token rows, but adapter_config.json's trainable_token_indices ({said!r}) do not say which"
        )
    return found


def refuse_options(config: Mapping[str, Any]) -> None:
    """Raise AdapterError for options whose arithmetic would silently be wrong here."""
    refused = [
        f"{name}={config[name]!r}" for name, plain in PLAIN.items() if name in config and config[name] not in plain
    ]
    if refused:
        raise AdapterError(f"adapter_config.json has {listed(refused)}: this version does not merge such adapters")
    for name, known in (("use_rslora", (True, False, None)), ("bias", ("none", "all", "lora_only", None))):
        if config.get(name) not in known:
            expected = "true or false" if name == "use_rslora" else "none, all or lora_only"
            raise AdapterError(f"adapter_config.json has {name}={config[name]!r}; expected {expected}")
    initializations.start_of(config)


def _lora(
    module: str, A: Tensor, B: Tensor, rank: int, scale: float, config: Mapping[str, Any], embedding: bool
) -> LoraUpdate | variants.ByWidth:  # fmt: skip
    if min(A.ndim, B.ndim) < 2:
        raise AdapterError(f"{module}: lora_A has shape {list(A.shape)} and lora_B {list(B.shape)}: expected matrices")
    plain = embedding or A.ndim > 2
    A_RI, B_OR = variants.convolution(module, A, B, rank) if max(A.ndim, B.ndim) > 2 else (A, B)
    update = LoraUpdate(A_RI, B_OR, scale) if plain else variants.linear(module, A_RI, B_OR, scale, config)
    lora = update if isinstance(update, LoraUpdate) else update.update
    if not lora.A_RI.shape[0] == lora.B_OR.shape[1] == rank:
        raise AdapterError(
            f"{module}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are not of rank {rank}, "
            f"which adapter_config.json gives"
        )
    if embedding:  # its weight is [tokens, features], its delta (B A)ᵀ
        return LoraUpdate(B_OR.T.contiguous(), A_RI.T.contiguous(), scale)
    return update


def _dora(
    module: str, lora: LoraUpdate | variants.ByWidth, magnitude: Tensor, config: Mapping[str, Any], embedding: bool
) -> DoraUpdate:  # fmt: skip
    """peft's DoRA takes no other variant beside it: where one is asked for too, the layer was one that ignores it."""
    if not config.get("use_dora"):
        raise AdapterError(f"{module} has a lora_magnitude_vector, but adapter_config.json does not say use_dora")
    plain = lora if isinstance(lora, LoraUpdate) else lora.plain
    expected, one = (plain.shape[1], "feature") if embedding else (plain.shape[0], "output")
    if magnitude.numel() != expected:
        raise AdapterError(
            f"{module}.lora_magnitude_vector has shape {list(magnitude.shape)}, expected [{expected}], one per {one}"
        )
    return DoraUpdate(plain, magnitude.flatten(), by_column=embedding)


def _kasa(
    module: str, lora: LoraUpdate | variants.ByWidth, diagonal_R: Tensor, config: Mapping[str, Any]
) -> LoraUpdate:  # fmt: skip
    """B · diag · A."""
    variants.check_said(f"{module}.lora_diag", "lora_diag", config)
    if not isinstance(lora, LoraUpdate) or initializations.start_of(config):
        raise AdapterError(f"{module} has a lora_diag: peft's KaSA takes no other variant or initialisation beside it")
    if diagonal_R.shape != (lora.rank,):
        raise AdapterError(f"{module}.lora_diag has shape {list(diagonal_R.shape)}, expected [{lora.rank}]")
    return replace(lora, B_OR=lora.B_OR * diagonal_R)


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha = settings(module, config)
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def settings(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """(rank, alpha) of a module, with peft's own rule for ``rank_pattern`` and ``alpha_pattern``."""
    try:
        rank = _by_pattern(config.get("rank_pattern") or {}, module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        if int(rank) < 1:
            raise AdapterError(f"adapter_config.json gives {module} the rank {rank}; expected 1 or more")
        if not abs(float(alpha)) < LARGEST_ALPHA:
            raise AdapterError(f"adapter_config.json gives {module} the alpha {alpha}; expected a number like 16")
        return int(rank), float(alpha)
    except (KeyError, TypeError, ValueError, re.error) as cause:
        raise AdapterError(
            f"adapter_config.json: r, lora_alpha or a pattern is missing or no number: {cause!r}"
        ) from cause


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    if not isinstance(patterns, dict):
        raise AdapterError(
            f"adapter_config.json: rank_pattern and alpha_pattern map names to numbers, found {patterns!r}"
        )
    if not patterns:
        return default  # most adapters have none, and importing peft takes seconds
    from peft.utils.other import get_pattern_key

    return patterns.get(get_pattern_key(patterns.keys(), module), default)
