"""Round up or down at random, right on average: keeps the delta in expectation, adds noise (arXiv 1502.02551)."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from qmerge.grids import UP, Grid
from qmerge.rounding.base import RoundingContext

WORDS = 4  # 64-bit numbers that one step of Philox's counter gives


def choose(values_OI: Tensor, grid: Grid, context: RoundingContext) -> Tensor:
    """Each value goes to the level above with probability (value − below) / (above − below), else to the one below."""
    below_OI = grid.floor(values_OI, context.near_OI)
    above_OI = grid.step(below_OI, UP)
    low_OI = grid.decode(below_OI)
    gap_OI = grid.decode(above_OI) - low_OI
    share_OI = torch.where(gap_OI > 0, (values_OI - low_OI) / gap_OI, torch.zeros_like(gap_OI))
    return torch.where(uniform(values_OI, context) < share_OI, above_OI, below_OI)


def uniform(values_OI: Tensor, context: RoundingContext) -> Tensor:
    """float32 [O, I] in [0, 1): a function of (seed, weight, position) alone, whatever the device, order or grouping."""
    key = hashlib.sha256(f"{context.seed}:{context.name}".encode()).digest()
    first = context.rows.start * values_OI.shape[1]
    generator = np.random.Philox(key=int.from_bytes(key[:16], "little"))
    generator.advance(first // WORDS)
    skip = first % WORDS
    numbers = np.random.Generator(generator).random(skip + values_OI.numel())[skip:]
    # Rounding a double just below 1 to float32 may give 1; as a share that is below 1 it still rounds down. Harmless.
    return torch.from_numpy(numbers.astype(np.float32)).view(values_OI.shape).to(values_OI.device)
