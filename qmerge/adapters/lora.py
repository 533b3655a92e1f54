"""LoRA and rsLoRA on linear layers: delta = scale · B · A (arXiv 2106.09685, 2312.03732)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qmerge.errors import AdapterError, listed
from qmerge.types import Rows, Update

PEFT_TYPES = ("LORA",)

KEY = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.(?:[^.]+\.)?weight")

FEWEST_ROWS = 16
LARGEST_ALPHA = 1e6

# Options of LoraConfig (peft 0.21) that change what a correct merge is, with the values that leave it plain.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "kasa_config": (None, {}),
    "monteclora_config": (None, {}),
    "velora_config": (None, {}),
    "arrow_config": (None, {}),
    "alora_invocation_tokens": (None, []),
    "megatron_config": (None, {}),
    "loftq_config": (None, {}),
    "corda_config": (None, {}),
    "lora_ga_config": (None, {}),
    "nvfp4_merge_aware": (None, False),  # axolotl: trained through NVFP4's own rounding
}
# Initialisations that leave the base as it was; the others (pissa, olora, corda, loftq, …) train on a changed base.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class LoraUpdate:
    """A_RI and B_OR are float32."""

    A_RI: Tensor
    B_OR: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.A_RI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.B_OR.shape[0], self.A_RI.shape[1]

    def to(self, device: torch.device) -> LoraUpdate:
        return replace(self, A_RI=self.A_RI.to(device), B_OR=self.B_OR.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        # The order of peft's get_delta_weight, so that float32 results are bit-identical: (B @ A) * scale, then added.
        # BLAS gives other last bits for products of a few rows: never take fewer, so that row blocks change no byte.
        start = max(0, min(rows.start, self.shape[0] - FEWEST_ROWS))
        product_OI = self.B_OR[start : max(rows.stop, start + FEWEST_ROWS)] @ self.A_RI
        return base_OI + product_OI[rows.start - start : rows.stop - start] * self.scale

    def row_norms(self) -> Tensor:
        return self._row_norms_O

    @cached_property
    def _row_norms_O(self) -> Tensor:
        gram_RR = self.A_RI.double() @ self.A_RI.double().T
        B_OR = self.B_OR.double()
        return (B_OR @ gram_RR * B_OR).sum(dim=1).clamp(min=0).sqrt().mul(abs(self.scale)).float()

    def directions(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._svd

    @cached_property
    def _svd(self) -> tuple[Tensor, Tensor, Tensor]:
        # scale B A = Q_B (scale R_B R_Aᵀ) Q_Aᵀ: the SVD of an [R, R] matrix is all it takes.
        Q_OR, R_B = torch.linalg.qr(self.B_OR.double())
        Q_IR, R_A = torch.linalg.qr(self.A_RI.double().T)
        u_RR, s_R, vt_RR = torch.linalg.svd(self.scale * R_B @ R_A.T)
        return (Q_OR @ u_RR[:, : len(s_R)]).float(), s_R.float(), (Q_IR @ vt_RR.T[:, : len(s_R)]).float()


def updates(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, tuple[Update, list[str]]]:
    """One update per module, and the tensors it is made of.

    Args:
        config: adapter_config.json.
        tensors: float32, by name without ``base_model.model.``.

    Raises:
        AdapterError: an option or tensor that is not plain LoRA; half a pair; a rank that is not the config's.
    """
    refuse_options(config)
    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(tensors):
        match = KEY.fullmatch(name)
        if not match:
            raise AdapterError(
                f"adapter tensor {name!r} is no lora_A or lora_B of a linear layer: this version cannot merge it"
            )
        halves = pairs.setdefault(match["module"], {})
        if match["half"] in halves:
            raise AdapterError(
                f"{name!r} and {halves[match['half']]!r} are both lora_{match['half']} of {match['module']}: "
                f"the file holds several adapters; save one of them by itself"
            )
        halves[match["half"]] = name
    return {
        module: (_update(module, halves, config, tensors), sorted(halves.values())) for module, halves in pairs.items()
    }


def refuse_options(config: Mapping[str, Any]) -> None:
    """Raise AdapterError for options that plain LoRA arithmetic would silently get wrong."""
    refused = [
        f"{name}={config[name]!r}" for name, plain in PLAIN.items() if name in config and config[name] not in plain
    ]
    if refused:
        raise AdapterError(f"adapter_config.json has {listed(refused)}: this version merges plain LoRA and rsLoRA only")
    if config.get("use_rslora") not in (True, False, None):
        raise AdapterError(f"adapter_config.json has use_rslora={config['use_rslora']!r}; expected true or false")
    init = config.get("init_lora_weights", True)
    if init not in PLAIN_INITS:
        raise AdapterError(
            f"adapter_config.json has init_lora_weights={init!r}, which changes the base before training: B·A on the "
            f"original base is a wrong model. Save the adapter converted (path_initial_model_for_weight_conversion)."
        )


def _update(
    module: str, halves: Mapping[str, str], config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> LoraUpdate:
    missing = [half for half in "AB" if half not in halves]
    if missing:
        raise AdapterError(
            f"{module} has lora_{'AB'.replace(missing[0], '')} but no lora_{missing[0]}: the adapter is incomplete"
        )
    A_RI, B_OR = tensors[halves["A"]], tensors[halves["B"]]
    if A_RI.ndim != 2 or B_OR.ndim != 2:
        raise AdapterError(
            f"{module}: lora_A has shape {list(A_RI.shape)}: only linear layers are merged in this version"
        )
    rank, alpha = settings(module, config)
    if not A_RI.shape[0] == B_OR.shape[1] == rank:
        raise AdapterError(
            f"{module}: lora_A {list(A_RI.shape)} and lora_B {list(B_OR.shape)} are not of rank {rank}, "
            f"which adapter_config.json gives"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return LoraUpdate(A_RI, B_OR, scale)


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
