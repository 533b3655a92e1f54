"""Initialisations of LoRA that change the base before training (peft 0.21, tuners/lora/layer.py): repeated, or refused with
the way out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qmerge.adapters.updates.lora import DoraUpdate, LoraUpdate, WrappingUpdate
from qmerge.errors import AdapterError
from qmerge.types import Rows

PLAIN = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""These leave the base as it was."""

CONVERT = (
    "Save it converted, where it was trained: save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL), "
    "or merge it onto the changed base, with init_lora_weights true in adapter_config.json"
)
REFUSED = {
    "pissa_niter_": f"took a randomized SVD out of the base, which comes out differently every time. {CONVERT}",
    "corda": f"took a part out of the base that depends on the data of preprocess_corda. {CONVERT}",
    "lora_ga": f"took a part out of the base that depends on the gradients of preprocess_loraga. {CONVERT}",
    "loftq": (
        "trained beside a quantized copy of the base, which LoftQ fitted together with the adapter. Merge it onto that copy "
        "(what LoftQ saved as base), with init_lora_weights true and loftq_config {} in adapter_config.json"
    ),
}
"""Beginning of a value of ``init_lora_weights`` → what it does, and what to do."""

RESIDUAL_FOLDERS = ("pissa_init", "pissa_backup")
"""LLaMA-Factory (PissaConvertCallback, scripts/pissa_init.py) saves them with ``init_lora_weights`` true, though they belong
to the base without its principal part."""

Start = Literal["pissa", "olora", "kasa"]


def start_of(config: Mapping[str, Any]) -> Start | None:
    """How training changed the base, where that can be repeated; None where it did not.

    Raises:
        AdapterError: it cannot be repeated from the base alone; an unknown initialisation.
    """
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    for beginning, why in REFUSED.items():
        if isinstance(name, str) and name.startswith(beginning):
            raise AdapterError(f"adapter_config.json has init_lora_weights={init!r}: training {why}")
    if config.get("loftq_config"):
        raise AdapterError(
            f"adapter_config.json has loftq_config={config['loftq_config']!r}: training {REFUSED['loftq']}"
        )
    if name in ("pissa", "olora"):
        if name == "olora" and config.get("fan_in_fan_out"):
            raise AdapterError(
                f"adapter_config.json has init_lora_weights={init!r} and fan_in_fan_out: peft decomposes such weights "
                f"the wrong way round. {CONVERT}"
            )
        return name  # type: ignore[return-value]
    if name not in PLAIN:
        raise AdapterError(
            f"adapter_config.json has init_lora_weights={init!r}, which this version does not know: it may change the base "
            f"before training. {CONVERT}"
        )
    return None


def check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise AdapterError for a folder of LLaMA-Factory whose name alone tells that it belongs to another base."""
    if folder.resolve().name in RESIDUAL_FOLDERS and config.get("init_lora_weights", True) is True:
        raise AdapterError(
            f"{folder} is what LLaMA-Factory saves of PiSSA for the base without its principal part, though "
            f"adapter_config.json says init_lora_weights=true: take the folder pissa_converted beside it"
        )


def without_principal(base_OI: Tensor, rank: int, scale: float) -> Tensor:
    """PiSSA (arXiv 2404.02948): base − s B₀ A₀, from the ``rank`` largest singular values; peft's operations in peft's order."""
    u_OK, s_K, vt_KI = torch.linalg.svd(base_OI, full_matrices=False)
    root_RR = torch.diag(torch.sqrt(s_K[:rank] / scale))
    A_RI, B_OR = root_RR @ vt_KI[:rank], u_OK[:, :rank] @ root_RR
    changed_OI: Tensor = base_OI - scale * B_OR @ A_RI
    return changed_OI


def without_leading(base_OI: Tensor, rank: int, scale: float) -> Tensor:
    """OLoRA (arXiv 2406.01775): base − s Q R, the ``rank`` first columns and rows of its QR decomposition."""
    Q_OK, R_KI = torch.linalg.qr(base_OI)
    changed_OI: Tensor = base_OI - scale * Q_OK[:, :rank].contiguous() @ R_KI[:rank].contiguous()
    return changed_OI


def without_noise(base_OI: Tensor, rank: int, scale: float) -> Tensor:
    """KaSA (arXiv 2412.06071): the base without its ``rank`` smallest singular values."""
    u_OK, s_K, vt_KI = torch.linalg.svd(base_OI, full_matrices=False)
    kept = len(s_K) - rank
    changed_OI: Tensor = (u_OK[:, :kept] * s_K[:kept]) @ vt_KI[:kept]
    return changed_OI


STARTS: dict[Start, Callable[[Tensor, int, float], Tensor]] = {
    "pissa": without_principal,
    "olora": without_leading,
    "kasa": without_noise,
}


@dataclass(frozen=True)
class ChangedBaseUpdate(WrappingUpdate):
    """An update of the base as ``start`` left it. In float32 throughout, where peft rounds that base to the model's dtype."""

    start: Start
    update: LoraUpdate | DoraUpdate

    whole = True

    @property
    def needs_dense(self) -> str:
        """Why it is merged onto 16- or 32-bit values only. peft knows PiSSA and KaSA on no quantized layer; OLoRA it does,
        but then it quantizes what is left of the base anew, on scales that no file has."""
        name = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA"}[self.start]
        return f"{name} decomposes the weights that training began with, and a quantized copy has others"

    def to(self, device: torch.device) -> ChangedBaseUpdate:
        return replace(self, update=self.update.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        """All rows at once."""
        return self.update.apply(STARTS[self.start](base_OI, self.rank, self.scale), rows)
