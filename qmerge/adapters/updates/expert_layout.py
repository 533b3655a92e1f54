"""Order of the columns of lora_B on stacked experts: rank by rank, as peft has them, or expert by expert.

Unsloth wrote them expert by expert for a time (unslothai/unsloth-zoo#1232, #1269). The shape is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from qmerge.errors import AdapterError

Layout = Literal["rank_major", "expert_major"]

LAYOUT = "lora_B_layout"
"""Option in adapter_config.json that decides; qmerge's own, for adapters whose numbers do not."""

LAYOUTS: tuple[Layout, ...] = ("rank_major", "expert_major")

CLEAR = 5.0
"""Standard errors by which one layout of lora_B must beat the other."""

EXPERTS_COMPARED = 16


def layout_of(parameter: str, B_OR: Tensor, *, count: int, rank: int, config: Mapping[str, Any]) -> Layout:
    """The layout of lora_B of one parameter.

    The config decides. If it does not, and Unsloth made the adapter, the values decide.

    Args:
        B_OR: float32 [O, count · rank].
        count: number of experts.

    Raises:
        AdapterError: Unsloth made the adapter and the values are not clear; or peft made it and they contradict.
    """
    option = config.get(LAYOUT)
    if option is not None and option not in LAYOUTS:
        raise AdapterError(f"adapter_config.json has {LAYOUT}={option!r}; expected {' or '.join(LAYOUTS)}")
    if option == "expert_major":
        return "expert_major"
    # With one rank or one expert both layouts are the same.
    if option or rank == 1 or count == 1:
        return "rank_major"
    lead = rank_major_lead(B_OR, count, rank)
    by_unsloth = bool((config.get("auto_mapping") or {}).get("unsloth_fixed") or config.get("unsloth_training_method"))
    # Adapters are rank by rank unless Unsloth made them: then only clear numbers decide.
    if lead > CLEAR or (not by_unsloth and lead > -CLEAR):
        return "rank_major"
    if lead < -CLEAR and by_unsloth:
        return "expert_major"
    numbers = "look expert by expert" if lead < -CLEAR else "do not tell"
    raise AdapterError(
        f"{parameter}: the columns of lora_B run rank by rank (peft) or expert by expert (Unsloth, for a time), and the "
        f'numbers {numbers}. Write "{LAYOUT}": "rank_major" or "expert_major" into adapter_config.json'
    )


def rank_major_lead(B_OR: Tensor, count: int, rank: int) -> float:
    """How much more similar the columns of one expert are if they run rank by rank than if expert by expert.

    In standard errors of the mean |cosine| of two columns, over a sample of experts. (Columns of one expert are similar
    because they come from the gradients that the expert's tokens sent through its outputs.)
    """
    unit_B_OR = torch.nn.functional.normalize(B_OR, dim=0)
    sample = range(0, count, max(1, count // EXPERTS_COMPARED))
    first, second = torch.triu_indices(rank, rank, offset=1)
    means: list[float] = []
    squared_error = 0.0
    for layout in LAYOUTS:
        columns_EOR = split_columns(unit_B_OR, count, rank, layout)
        cosines = torch.cat([(columns_EOR[e].T @ columns_EOR[e])[first, second].abs() for e in sample]).double()
        means.append(float(cosines.mean()))
        squared_error += float(cosines.var(correction=0)) / len(cosines)
    if not squared_error:
        return 0.0
    return (means[0] - means[1]) / math.sqrt(squared_error)


def split_columns(B_OR: Tensor, count: int, rank: int, layout: Layout) -> Tensor:
    """[O, count · rank] → [count, O, rank]: the columns of each expert."""
    if layout == "rank_major":
        return B_OR.reshape(-1, rank, count).permute(2, 0, 1)
    return B_OR.reshape(-1, count, rank).permute(1, 0, 2)
