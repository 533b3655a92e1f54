"""Tensors that peft draws again instead of saving them: drawn by peft itself, for a model of the base's layers without values.

What peft draws depends on seeds in the config, and on the shapes or the order of all targeted layers in the model. So the whole
model is wrapped, with weights that take no memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qmerge.adapters.updates.peft_layer import CLEARED, LOCK, PREFIX, SHARED_PREFIX, add_under_name, peft_config
from qmerge.checkpoint.architecture import meta_model
from qmerge.checkpoint.names import Names
from qmerge.errors import CheckpointError

PLACES = ("layers_to_transform", "layers_pattern", "exclude_modules", "fan_in_fan_out")
"""Options that say which layers of a whole model are targeted, or how they are oriented."""

ORDERED = ("TINYLORA", "UNILORA")
"""Types whose draws depend on the order of the layers in the model, which files do not show."""


def drawn_tensors(config: Mapping[str, Any], names: Names, *, save_option: str) -> dict[str, Tensor]:
    """All that peft would save of a fresh adapter with ``save_option``, by name without ``base_model.model.``.

    Trained tensors are among them, with initial values.

    Args:
        config: adapter_config.json.
        names: of the base's weights.

    Raises:
        CheckpointError: transformers does not know the architecture, and several layers are targeted, whose order counts.
        AdapterError: the installed peft has no such adapters.
        ValueError: peft does not put the adapter on this model.
    """
    from peft import get_peft_model, get_peft_model_state_dict

    whole = {name: value for name, value in CLEARED.items() if name not in PLACES}
    settings = peft_config({**config, **whole, save_option: True}, config["target_modules"])
    # Only transformers' model has the layers in the order that peft saw in training.
    model = known_model = _known_model(names)
    if model is None:
        model = model_on_disk(names, bool(config.get("fan_in_fan_out")))
    without_values(model)
    if settings.peft_type == "TINYLORA":
        shrink(model, settings.r)
    with LOCK, torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, settings, autocast_adapter_dtype=False)
        if known_model is None and settings.peft_type in ORDERED and len(wrapped.base_model.targeted_module_names) > 1:
            raise CheckpointError(
                "transformers does not know the architecture, so the order of its layers is not known"
            )
        tensors = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    # As reading/folder.py names the tensors of a file.
    drawn: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        drawn[name.removeprefix(PREFIX).removeprefix(SHARED_PREFIX)] = tensor
    return drawn


def _known_model(names: Names) -> nn.Module | None:
    """The base's model as transformers builds it; None where it does not know the architecture."""
    try:
        return meta_model(names.config)
    except CheckpointError:
        return None


def model_on_disk(names: Names, turned: bool) -> nn.Module:
    """A model of the base's matrices as linear layers, in the order of the file.

    Args:
        turned: square matrices are [in, out]; others are where the bias is as long as the columns (Conv1D).
    """
    from transformers.pytorch_utils import Conv1D

    root = nn.Module()
    for name, shape in names.disk.items():
        *parents, last, local = name.split(".") if "." in name else ("", "", name)
        if local != "weight" or len(shape) != 2:
            continue
        rows, columns = shape
        # transformers' Conv1D always has a bias.
        bias = names.disk.get(f"{name.removesuffix('weight')}bias")
        is_turned = turned if rows == columns else bias == (columns,)
        with torch.device("meta"):
            layer = Conv1D(columns, rows) if is_turned else nn.Linear(columns, rows, bias=False)
        add_under_name(root, [*parents, last], layer)
    return root


def without_values(model: nn.Module) -> None:
    """Put the model's matrices on the CPU: zeros that all are one number in memory."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            module.weight = nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)


def shrink(model: nn.Module, rank: int) -> None:
    """Cut off what a decomposition of this rank does not show: TinyLoRA decomposes every weight, which takes minutes."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2:
            module.weight = nn.Parameter(weight[:rank, :rank].contiguous(), requires_grad=False)
