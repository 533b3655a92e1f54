"""How much memory a calibration may take, and how it goes on where its batches do not fit together."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from qmerge.calibration.texts import BATCH_TOKENS
from qmerge.errors import RoomError
from qmerge.planning.memory import calibration_memory
from qmerge.planning.plan import Plan
from qmerge.recipe import parse_size
from qmerge.safetensors_io.disk import disk_errors


def memory_limit(max_memory: str | None, device: torch.device) -> int:
    """Bytes that a calibration may take: as much as ``--max-memory`` says, or as is free."""
    if max_memory is not None:
        return parse_size(max_memory)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def planned_memory(plan: Plan, tokens: int, device: torch.device) -> tuple[int, bool]:
    """What a calibration needs.

    Args:
        tokens: those that rounding learns from.

    Returns:
        Bytes, an estimate from shapes, and whether the batches of tokens take turns in a layer because they do not fit into
        memory together.

    Raises:
        RoomError: not even one batch fits into a ``--max-memory`` that was given.
    """
    sequential = plan.calibration.sequential
    needed = calibration_memory(plan.steps, tokens, sequential=sequential)
    limit = memory_limit(plan.recipe.max_memory, device)
    if needed <= limit:
        return needed, False
    least = calibration_memory(plan.steps, min(tokens, BATCH_TOKENS), sequential=sequential)
    # What is free is no promise, and memory that the system can swap out is not counted: only a given limit is kept.
    if plan.recipe.max_memory is not None and least > limit:
        raise RoomError(
            f"calibration needs about {least / 1e9:.2f} GB for a decoder layer, matrices of inputs x inputs and a batch of tokens, "
            f"but --max-memory is {plan.recipe.max_memory}: give more memory, or --calibration none"
        )
    return least, True


def temporary_folder(plan: Plan) -> Path:
    """The folder that holds the output folder; the system's one for temporary files where nothing is written."""
    destination = plan.recipe.out or plan.recipe.patch
    if destination is None:
        return Path(tempfile.gettempdir())
    return Path(destination).expanduser().absolute().parent


def in_mapped_file(output: Any, folder: Path) -> Any:
    """The output of a decoder layer, with its hidden states in a file from which the system reads them again when it needs
    their memory for something else. The file has no name, so it is gone with the tensor, whatever happens to the process.

    Args:
        folder: of the file.

    Raises:
        RoomError: the disk is full.
    """
    if isinstance(output, tuple):  # the hidden states are the first
        return in_mapped_file(output[0], folder), *output[1:]
    hidden_states: Tensor = output.cpu().contiguous()
    with disk_errors(folder), tempfile.NamedTemporaryFile(dir=folder, prefix=".qmerge-") as file:
        file.write(hidden_states.flatten().view(torch.uint8).numpy().data)
        file.flush()
        mapped = torch.from_file(file.name, size=hidden_states.numel(), dtype=hidden_states.dtype)
    return mapped.view(hidden_states.shape)
