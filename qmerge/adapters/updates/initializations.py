"""Initialisations of LoRA that change the base before training (peft 0.21, tuners/lora/layer.py): repeated, or refused.

peft subtracts a part of the base and trains on the rest. Where that part follows from the base alone it is computed again;
otherwise the error says how to convert the adapter.
"""

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
"""Values of ``init_lora_weights`` that leave the base as it was."""

CONVERT = (
    "Save it converted, where it was trained: save_pretrained(OUT, path_initial_model_for_weight_conversion=INITIAL), "
    "or merge it onto the changed base, with init_lora_weights true in adapter_config.json"
)
REFUSED = {
    "pissa_niter_": f"took a randomized SVD out of the base, which comes out differently every time. {CONVERT}",
    "corda": f"took a part out of the base that depends on the data of preprocess_corda. {CONVERT}",
    "lora_ga": f"took a part out of the base that depends on the gradients of preprocess_loraga. {CONVERT}",
    "loftq": (
        "started from a quantized copy of the base, which LoftQ fitted together with the adapter. Merge it onto that copy "
        "(the base that LoftQ saved), with init_lora_weights true and loftq_config {} in adapter_config.json"
    ),
}
"""Beginning of a value of ``init_lora_weights`` → the effect on training, and what to do."""

RESIDUAL_FOLDERS = ("pissa_init", "pissa_backup")
"""Folders that LLaMA-Factory saves (PissaConvertCallback, scripts/pissa_init.py) with ``init_lora_weights`` true, though they
belong to the base without its principal part."""

Start = Literal["pissa", "olora", "kasa"]
"""A change of the base that can be repeated."""


def start_of(config: Mapping[str, Any]) -> Start | None:
    """How training changed the base, where that can be repeated; None where it did not.

    Raises:
        AdapterError: it cannot be repeated from the base alone; an unknown initialisation.
    """
    init = config.get("init_lora_weights", True)
    name = init.lower() if isinstance(init, str) else init
    for beginning, effect in REFUSED.items():
        if isinstance(name, str) and name.startswith(beginning):
            raise AdapterError(f"adapter_config.json has init_lora_weights={init!r}: training {effect}")
    if config.get("loftq_config"):
        raise AdapterError(
            f"adapter_config.json has loftq_config={config['loftq_config']!r}: training {REFUSED['loftq']}"
        )
    if name == "pissa":
        return "pissa"
    if name == "olora" and config.get("fan_in_fan_out"):
        raise AdapterError(
            f"adapter_config.json has init_lora_weights={init!r} and fan_in_fan_out: peft decomposes such weights "
            f"the wrong way round. {CONVERT}"
        )
    if name == "olora":
        return "olora"
    if name not in PLAIN:
        raise AdapterError(
            f"adapter_config.json has init_lora_weights={init!r}, which this version does not know: it may change the base "
            f"before training. {CONVERT}"
        )
    return None


def check_folder(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise AdapterError for a folder of LLaMA-Factory whose name alone shows that it belongs to another base."""
    if folder.resolve().name in RESIDUAL_FOLDERS and config.get("init_lora_weights", True) is True:
        raise AdapterError(
            f"{folder} is LLaMA-Factory's PiSSA adapter for the base without its principal part, though adapter_config.json "
            f"has init_lora_weights=true: take the folder pissa_converted next to it"
        )


def without_principal(base_OI: Tensor, rank: int, scale: float) -> Tensor:
    """PiSSA (arXiv 2404.02948): base − s B₀ A₀ of the ``rank`` largest singular values; peft's operations in peft's order."""
    u_OK, s_K, vt_KI = torch.linalg.svd(base_OI, full_matrices=False)
    root_RR = torch.diag(torch.sqrt(s_K[:rank] / scale))
    A_RI = root_RR @ vt_KI[:rank]
    B_OR = u_OK[:, :rank] @ root_RR
    changed_OI: Tensor = base_OI - scale * B_OR @ A_RI
    return changed_OI


def without_leading(base_OI: Tensor, rank: int, scale: float) -> Tensor:
    """OLoRA (arXiv 2406.01775): base − s Q R, the first ``rank`` columns and rows of its QR decomposition."""
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
"""Start → (float32 base [O, I], rank, scale) → the base that training began with."""

TITLES: dict[Start, str] = {"pissa": "PiSSA", "olora": "OLoRA", "kasa": "KaSA"}


@dataclass(frozen=True)
class ChangedBaseUpdate(WrappingUpdate):
    """An update of the base as ``start`` left it. float32 throughout, where peft rounds that base to the model's dtype."""

    start: Start
    update: LoraUpdate | DoraUpdate

    whole = True  # decompositions need the whole matrix

    @property
    def needs_dense(self) -> str:
        """It is merged onto 16- or 32-bit values only.

        peft has PiSSA and KaSA on no quantized layer. It has OLoRA, but there it quantizes the rest of the base again, on
        scales that no file contains.
        """
        return f"{TITLES[self.start]} decomposes the weights that training began with, and a quantized copy has others"

    def to(self, device: torch.device) -> ChangedBaseUpdate:
        return replace(self, update=self.update.to(device))

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        changed_OI = STARTS[self.start](base_OI, self.rank, self.scale)
        return self.update.apply(changed_OI, rows)
