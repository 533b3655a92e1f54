"""The merges that are golden, and their hashes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qmerge.demo
from qmerge import run
from qmerge.recipe import make_recipe

from .. import models
from ..conftest import snapshot

DEMO = Path(qmerge.demo.__file__).parent
HASHES = Path(__file__).parent / "hashes.json"

ROUNDINGS = ("nearest", "stochastic")
TARGETS = ("nf4", "fp4", "int8", "fp8", "bf16", "fp32")
"""Grids whose scales are the base's own or follow from the largest values."""

CHANGING = ("qmerge.json", "qmerge.html", "qmerge_recipe.yaml", "README.md")
"""Files of an output that hold versions, dates or paths."""

STEP_A, STEP_B = 2.0**-10, 2.0**-14
"""The adapter's values are cut to multiples of these: at most 7 and 6 bits, so that a sum of 8 products has at most 16."""

ALPHA = 256
"""Instead of 16, with which ``nearest`` changes no code of the base."""


def golden_hashes(folder: Path, target: str, rounding: str) -> dict[str, str]:
    """SHA-256 of the files that a merge writes into ``folder``, by name."""
    settings = {
        "base": str(DEMO / "base-nf4"),
        "adapter": str(exact_adapter(folder.parent / "adapter")),
        "target": target,
        "rounding": rounding,
        "device": "cpu",
        "out": str(folder),
    }
    run.merge(make_recipe(settings))
    return {name: sha256 for name, sha256 in snapshot(folder).items() if name not in CHANGING}


def exact_adapter(folder: Path) -> Path:
    """The demo's adapter, with values whose products float32 adds exactly, and made stronger."""
    if not folder.exists():
        shutil.copytree(DEMO / "adapter", folder)
        tensors = load_file(folder / "adapter_model.safetensors")
        cut = {name: cut_to(values, STEP_A if "lora_A" in name else STEP_B) for name, values in tensors.items()}
        save_file(cut, folder / "adapter_model.safetensors")
        models.edit_json(folder / "adapter_config.json", lora_alpha=ALPHA)
    return folder


def cut_to(values: Tensor, step: float) -> Tensor:
    return torch.round(values / step) * step


def known_hashes() -> dict[str, dict[str, str]]:
    """Target and rounding → name of a file → SHA-256."""
    return dict(json.loads(HASHES.read_text()))


def name_of(target: str, rounding: str) -> str:
    return f"{target}, {rounding}"
