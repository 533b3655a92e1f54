"""LoRA, rsLoRA, DoRA and peft's variants, with trained biases, token rows and modules (arXiv 2106.09685, 2402.09353)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from qmerge.adapters.base import AdapterKind, Changes, add_change
from qmerge.adapters.reading.patterns import first_matching
from qmerge.adapters.reading.saved_weights import add_saved_weights, check_saved_weights
from qmerge.adapters.reading.targeted_parameters import targeted_parameters
from qmerge.adapters.updates import initializations, variants
from qmerge.adapters.updates.experts import TargetedParameter, stack_update
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, LoraUpdate
from qmerge.checkpoint.names import Names
from qmerge.errors import AdapterError, listed
from qmerge.types import Update

KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|lora_diag)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
"""``….lora_A.weight``, with the adapter's name in between where peft did not remove it."""

DEFAULT = 8
"""``r`` and ``lora_alpha`` where the config leaves them out (peft/tuners/lora/config.py)."""

LARGEST_RANK = 1_000_000
LARGEST_ALPHA = 1e6
"""A larger rank or alpha is a damaged config, not a setting."""

PLAIN: dict[str, tuple[Any, ...]] = {
    "nvfp4_merge_aware": (None, False),  # axolotl: trained through NVFP4's own rounding
}
"""Options that change the result and are not handled → values that leave LoRA plain. More are in ``updates/variants.py`` and
``updates/initializations.py``."""


class LoraKind(AdapterKind):
    """``peft_type`` LORA, without peft's code."""

    peft_types = ("LORA",)

    def check_folder(self, folder: Path, config: Mapping[str, Any]) -> None:
        initializations.check_folder(folder, config)

    def updates(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Names | None) -> Changes:
        """As ``AdapterKind.updates``; ``names`` are needed for ``target_parameters`` only.

        Raises:
            AdapterError: an option or tensor that is not handled; half a pair; another rank than the config's.
            NeedsBaseError: the config has ``target_parameters`` and there are no names.
        """
        refuse_options(config)
        variants.refuse(config, list(tensors))
        loras, other_tensors = sorted_by_module(config, tensors)
        parameters = targeted_parameters(list(loras), config, names)
        changes: Changes = {}
        for module, parts in loras.items():
            if module in parameters:
                add_parameter_change(changes, parameters[module], parts, config)
            else:
                add_module_changes(changes, parts, config)
        add_saved_weights(changes, other_tensors, config, tensors)
        check_saved_weights(changes, config, names)
        return changes


KIND = LoraKind()


@dataclass(frozen=True, kw_only=True)
class LoraParts:
    """The tensors of one module's LoRA.

    module         the module's name in the adapter
    tensors        all tensors of the adapter
    names          part (``lora_A``, ``lora_B``, ``lora_B.bias``, ``lora_magnitude_vector``, …) → name of its tensor
    training_only  names of tensors that no forward pass uses
    """

    module: str
    tensors: Mapping[str, Tensor]
    names: dict[str, str] = field(default_factory=dict)
    training_only: list[str] = field(default_factory=list)

    def __contains__(self, part: str) -> bool:
        return part in self.names

    def __getitem__(self, part: str) -> Tensor:
        return self.tensors[self.names[part]]

    @property
    def is_embedding(self) -> bool:
        """Whether it is the LoRA of an embedding, whose parts have other names."""
        return any(part.startswith("lora_embedding") for part in self.names)

    @property
    def halves(self) -> tuple[str, str]:
        """Names of the parts A and B."""
        return ("lora_embedding_A", "lora_embedding_B") if self.is_embedding else ("lora_A", "lora_B")

    def add(self, match: re.Match[str], name: str) -> None:
        """Add a tensor by its name, which ``KEY`` matched.

        Raises:
            AdapterError: another tensor is the same part.
        """
        part = "lora_B.bias" if match["leaf"] == "bias" else match["part"]
        if part in self.names:
            raise AdapterError(
                f"{name!r} and {self.names[part]!r} are both {part} of {self.module}: the file contains several adapters; "
                f"save one of them alone"
            )
        self.names[part] = name

    def check_pair(self) -> None:
        """Raise AdapterError unless both A and B are present."""
        A, B = self.halves
        for missing, present in ((A, B), (B, A)):
            if missing not in self.names:
                raise AdapterError(f"{self.module} has {present} but no {missing}: the adapter is incomplete")


def sorted_by_module(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, LoraParts], list[str]]:
    """(module → the parts of its LoRA, names of the tensors that are not part of a LoRA)."""
    loras: dict[str, LoraParts] = {}
    training_only: dict[str, list[str]] = {}
    others: list[str] = []
    # Sorted, so that reports list modules in one order, whatever the order in the file.
    for name in sorted(tensors):
        match = KEY.fullmatch(name)
        trained_module = variants.training_only(name, config)
        if match:
            module = match["module"]
            parts = loras.setdefault(module, LoraParts(module=module, tensors=tensors))
            parts.add(match, name)
        elif trained_module:
            training_only.setdefault(trained_module, []).append(name)
        else:
            others.append(name)
    for module, names in training_only.items():
        # Without a LoRA in the same module they belong to nothing, and are refused as left over.
        if module in loras:
            loras[module].training_only.extend(names)
    return loras, others


# --- changes ---------------------------------------------------------------------------------------------------------


def add_parameter_change(
    changes: Changes, parameter: TargetedParameter, parts: LoraParts, config: Mapping[str, Any]
) -> None:
    """Add the LoRA of a parameter that peft wraps by itself: plain LoRA, of one matrix or of a stack.

    ``rank_pattern`` and ``alpha_pattern`` are matched with the parameter's name (peft/tuners/lora/layer.py, ParamWrapper).

    Raises:
        AdapterError: it is not plain, or does not fit the parameter.
    """
    names = sorted(parts.names.values())
    # peft's ParamWrapper multiplies two plain factors: it has no magnitude, diagonal or bias.
    if parts.names.keys() != {"lora_A", "lora_B"} or initializations.start_of(config):
        raise AdapterError(
            f"{parameter.name} is one of target_parameters, where peft has plain LoRA only; found {listed(names)} with "
            f"init_lora_weights={config.get('init_lora_weights', True)!r}"
        )
    rank, scale = rank_and_scale(parameter.name, config)
    update = stack_update(parameter, parts["lora_A"], parts["lora_B"], rank=rank, scale=scale, config=config)
    add_change(changes, parameter.name, update, names)


def add_module_changes(changes: Changes, parts: LoraParts, config: Mapping[str, Any]) -> None:
    """Add the changes of a module's weight and bias by its LoRA.

    Raises:
        AdapterError: half a pair, shapes that do not fit, or variants that peft does not combine.
    """
    parts.check_pair()
    rank, scale = rank_and_scale(parts.module, config)
    update = weight_update(parts, rank, scale, config)
    used = [name for part, name in parts.names.items() if part != "lora_B.bias"]
    add_change(changes, f"{parts.module}.weight", update, sorted([*used, *parts.training_only]))
    if "lora_B.bias" in parts:  # peft adds B's bias to the layer's output, scaled like the delta
        bias_1O = parts["lora_B.bias"].flatten()[None]
        add_change(changes, f"{parts.module}.bias", AddUpdate(bias_1O * scale, scale), [parts.names["lora_B.bias"]])


def weight_update(parts: LoraParts, rank: int, scale: float, config: Mapping[str, Any]) -> Update:
    """The change of a module's weight by its LoRA.

    Raises:
        AdapterError: shapes that do not fit, or variants that peft does not combine.
    """
    module = parts.module
    lora = lora_update(parts, rank, scale, config)
    # peft initializes embeddings as usual, whatever the config says.
    start = None if parts.is_embedding else initializations.start_of(config)
    if "lora_diag" in parts:
        lora = kasa_update(parts, lora, config)
        # KaSA removes the smallest singular values from the base before training.
        start = "kasa"
    if start and (parts.is_embedding or parts[parts.halves[0]].ndim > 2):
        raise AdapterError(
            f"{module} is not a linear layer, but its LoRA is {start}, which peft has on linear layers only"
        )
    update: Update = lora
    if "lora_magnitude_vector" in parts:
        update = dora_update(parts, lora, config)
    elif config.get("use_dora"):
        raise AdapterError(
            f"{module} has no lora_magnitude_vector, but adapter_config.json says use_dora: the adapter is incomplete"
        )
    if start is None:
        return update
    if isinstance(update, LoraUpdate) or (isinstance(update, DoraUpdate) and start != "kasa"):
        return initializations.ChangedBaseUpdate(start, update)
    raise AdapterError(
        f"{module}: peft has no layer that combines {start} with the other variant in adapter_config.json"
    )


def lora_update(
    parts: LoraParts, rank: int, scale: float, config: Mapping[str, Any]
) -> LoraUpdate | variants.ByWidthUpdate:
    """The product of A and B, as the weight is stored: [tokens, features] for an embedding.

    Raises:
        AdapterError: A and B are not matrices (or convolutions) of this rank.
    """
    A, B = (parts[half] for half in parts.halves)
    if min(A.ndim, B.ndim) < 2:
        raise AdapterError(
            f"{parts.module}: lora_A has shape {list(A.shape)} and lora_B {list(B.shape)}; expected matrices"
        )
    A_RI, B_OR = A, B
    if max(A.ndim, B.ndim) > 2:
        # A convolution, of any number of dimensions: its kernel becomes columns.
        A_RI, B_OR = variants.convolution(parts.module, A, B, rank)
    update: LoraUpdate | variants.ByWidthUpdate = LoraUpdate(A_RI, B_OR, scale)
    # peft has variants of linear layers only: in embeddings and convolutions it ignores the options.
    if not parts.is_embedding and A.ndim == 2:
        update = variants.linear(parts.module, A_RI, B_OR, scale=scale, config=config)
    lora = update if isinstance(update, LoraUpdate) else update.update
    # Factors are checked as they act: BD-LoRA stores B with fewer columns than the rank.
    if not lora.A_RI.shape[0] == lora.B_OR.shape[1] == rank:
        raise AdapterError(
            f"{parts.module}: lora_A {list(A.shape)} and lora_B {list(B.shape)} are not of rank {rank}, which adapter_config.json "
            f"gives"
        )
    if parts.is_embedding:  # the delta of [tokens, features] is (B A)ᵀ = Aᵀ Bᵀ
        return LoraUpdate(B_OR.T.contiguous(), A_RI.T.contiguous(), scale)
    return update


def dora_update(parts: LoraParts, lora: LoraUpdate | variants.ByWidthUpdate, config: Mapping[str, Any]) -> DoraUpdate:
    """DoRA around plain LoRA. peft's DoRA layer ignores any other variant that the config asks for.

    Raises:
        AdapterError: the config does not say DoRA, or the magnitude has another length.
    """
    if not config.get("use_dora"):
        raise AdapterError(
            f"{parts.module} has a lora_magnitude_vector, but adapter_config.json does not say use_dora; "
            f"set it, or remove the tensor"
        )
    plain = lora if isinstance(lora, LoraUpdate) else lora.plain
    magnitude = parts["lora_magnitude_vector"]
    by_column = parts.is_embedding
    expected = plain.shape[1] if by_column else plain.shape[0]
    if magnitude.numel() != expected:
        unit = "feature" if by_column else "output"
        raise AdapterError(
            f"{parts.module}.lora_magnitude_vector has shape {list(magnitude.shape)}, expected [{expected}], one per {unit}"
        )
    return DoraUpdate(plain, magnitude.flatten(), by_column=by_column)


def kasa_update(parts: LoraParts, lora: LoraUpdate | variants.ByWidthUpdate, config: Mapping[str, Any]) -> LoraUpdate:
    """KaSA's delta, B · diag · A.

    Raises:
        AdapterError: the config does not say KaSA, or says another variant too; the diagonal has another length.
    """
    variants.check_option(f"{parts.module}.lora_diag", "lora_diag", config)
    if not isinstance(lora, LoraUpdate) or initializations.start_of(config):
        raise AdapterError(
            f"{parts.module} has a lora_diag, but adapter_config.json also has another variant or initialisation, which peft does "
            f"not combine with KaSA"
        )
    diagonal_R = parts["lora_diag"]
    if diagonal_R.shape != (lora.rank,):
        raise AdapterError(f"{parts.module}.lora_diag has shape {list(diagonal_R.shape)}, expected [{lora.rank}]")
    return replace(lora, B_OR=lora.B_OR * diagonal_R)


# --- options ---------------------------------------------------------------------------------------------------------


def refuse_options(config: Mapping[str, Any]) -> None:
    """Refuse options that would make the result wrong without a trace.

    Raises:
        AdapterError: there is one, or an option has an unknown value.
    """
    refused: list[str] = []
    for name, plain_values in PLAIN.items():
        if name in config and config[name] not in plain_values:
            refused.append(f"{name}={config[name]!r}")
    if refused:
        raise AdapterError(f"adapter_config.json has {listed(refused)}: this version does not merge such adapters")
    if config.get("use_rslora") not in (True, False, None):
        raise AdapterError(f"adapter_config.json has use_rslora={config['use_rslora']!r}; expected true or false")
    if config.get("bias") not in ("none", "all", "lora_only", None):
        raise AdapterError(f"adapter_config.json has bias={config['bias']!r}; expected none, all or lora_only")
    # Raises for a start that cannot be repeated, also where no linear layer would ask for it.
    initializations.start_of(config)


def rank_and_scale(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """(rank, scale) of a module: scale is alpha / rank, or alpha / √rank for rsLoRA (arXiv 2312.03732)."""
    rank, alpha = rank_and_alpha(module, config)
    if config.get("use_rslora"):
        return rank, alpha / math.sqrt(rank)
    return rank, alpha / rank


def rank_and_alpha(module: str, config: Mapping[str, Any]) -> tuple[int, float]:
    """(rank, alpha) of a module, with peft's own rule for ``rank_pattern`` and ``alpha_pattern``.

    Raises:
        AdapterError: they are no numbers, or out of range.
    """
    try:
        # JSON gives whatever was written: strings, lists, infinity.
        rank = _by_pattern(config.get("rank_pattern") or {}, module, config.get("r", DEFAULT))
        alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config.get("lora_alpha", DEFAULT))
        if not 1 <= int(rank) <= LARGEST_RANK:
            raise AdapterError(
                f"adapter_config.json gives {module} the rank {str(rank)[:80]}; expected 1 to {LARGEST_RANK}"
            )
        if not abs(float(alpha)) < LARGEST_ALPHA:
            raise AdapterError(f"adapter_config.json gives {module} the alpha {alpha}; expected a number like 16")
        return int(rank), float(alpha)
    except (TypeError, ValueError, OverflowError) as cause:
        raise AdapterError(f"adapter_config.json: r, lora_alpha or a pattern is not a number: {cause!r}") from cause


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    if not isinstance(patterns, dict):
        raise AdapterError(
            f"adapter_config.json: rank_pattern and alpha_pattern map names to numbers, found {patterns!r}"
        )
    pattern = first_matching(patterns, module)
    return default if pattern is None else patterns[pattern]
