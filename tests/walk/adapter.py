"""A LoRA of every linear layer and every stack of experts of a model, made by peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

RANK = 4

MAMBA_MODELS = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""peft refuses to adapt ``out_proj`` of these models: their kernels would go past the adapter."""

SAVED_HEADS = {"classifier", "score"}
"""What peft trains whole in classifiers of sequences and tokens, so that it cannot have a LoRA."""


def adapted(model: Any, task: str | None, folder: Path) -> PeftModel:
    """The model with an adapter that is saved in ``folder``, all trained parameters moved at random."""
    return trained(
        model,
        folder,
        target_modules="all-linear",
        exclude_modules=_excluded(model, task) or None,
        target_parameters=_stacks(model) or None,
        task_type=task,
    )


def trained(model: Any, folder: Path, **settings: Any) -> PeftModel:
    """The model with a LoRA of these settings, all trained parameters moved at random, saved in ``folder``."""
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, **settings)
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    # None is adapted; to look whether one is, peft would ask speech models for theirs, which they have not.
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return wrapped


def _stacks(model: Any) -> list[str]:
    """Parameters that hold all experts of a layer."""
    return sorted(name for name, parameter in model.named_parameters() if parameter.ndim == 3 and "expert" in name)


def _excluded(model: Any, task: str | None) -> list[str]:
    """Linear layers that peft cannot adapt: it trains or refuses them, or their class answers with more than one tensor."""
    excluded = [name for name, module in model.named_modules() if _is_router(name, module)]
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        excluded += [name for name, _ in model.named_modules() if SAVED_HEADS & set(name.split("."))]
    if model.config.model_type in MAMBA_MODELS:
        excluded += [name for name, _ in model.named_modules() if name.endswith(".out_proj")]
    return excluded


def _is_router(name: str, module: Any) -> bool:
    return name.endswith("router") and isinstance(module, torch.nn.Linear) and type(module) is not torch.nn.Linear
