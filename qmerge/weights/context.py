"""Where a run computes and reads: shared by all its steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qmerge.errors import RecipeError
from qmerge.safetensors_io.reader import Reader


@dataclass(frozen=True)
class RunContext:
    """Where and how the steps of a run are done.

    reader         reads tensors from the input files
    device         where to compute
    seed           of stochastic rounding
    effort         of ``preserve``: a name in ``qmerge.rounding.base.EFFORTS``
    block_entries  float32 values to work on at a time (see ``rows.row_blocks``)
    """

    reader: Reader
    device: torch.device
    seed: int
    block_entries: int
    effort: str = "default"


def compute_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        RecipeError: ``cuda``, but torch finds no CUDA device.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        # Not silently on the CPU, where it may take hours instead of minutes.
        raise RecipeError("--device cuda: torch finds no CUDA device; use --device cpu or auto")
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
    return torch.device(name)
