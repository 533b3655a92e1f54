"""What there is to work with: the device, and how many values at a time, so that all stays within ``--max-memory``."""

from __future__ import annotations

from qmerge.errors import RoomError
from qmerge.formats import get_format
from qmerge.pipeline import AMPLE_ENTRIES, COPY_BYTES, blocks
from qmerge.recipe import Recipe, parse_size
from qmerge.types import Step

ARRAYS_PER_BLOCK = 16
"""float32 arrays of a block's size that a merge holds at its peak, temporaries of the metrics included (measured)."""

MOST_ENTRIES, FEWEST_ENTRIES = AMPLE_ENTRIES, 2**16
"""Values per row block: larger ones gain no speed on a CPU, smaller ones lose it."""


def block_entries(recipe: Recipe, steps: tuple[Step, ...]) -> int:
    """How many values to work on at a time, so that every step stays within ``max_memory``.

    Raises:
        RoomError: not even the smallest block of the largest weight fits.
    """
    budget = parse_size(recipe.max_memory) // recipe.workers
    entries = MOST_ENTRIES
    while entries > FEWEST_ENTRIES and any(step_memory(step, entries) > budget for step in steps):
        entries //= 2
    worst = max(steps, key=lambda step: step_memory(step, entries))
    needed = step_memory(worst, entries)
    if needed > budget:
        raise RoomError(
            f"{worst.name} needs {needed / 1e6:.1f} MB even in the smallest row blocks, but --max-memory {recipe.max_memory} "
            f"for {recipe.workers} workers leaves {budget / 1e6:.1f} MB"
        )
    return entries


def step_memory(step: Step, entries: int) -> int:
    """Bytes of memory at a step's peak: the float32 arrays of one block, and the scales of the whole weight."""
    if step.action == "copy":
        return COPY_BYTES
    rows = next(blocks(step, entries))
    source, target = get_format(step.weight.format), get_format(step.target)
    codes = step.weight.prefix + target.codes_part(step.weight.local)
    scales = sum(spec.nbytes for name, spec in step.outputs.items() if name != codes and spec.shape != (-1,))
    scales += sum(i.nbytes for local, i in step.weight.parts.items() if local != source.codes_part(step.weight.local))
    # Rows that are columns on disk are read and written as a whole: once, and once again while they are put together.
    held = source.row_axis * step.weight.nbytes + 2 * target.row_axis * (
        step.outputs[codes].nbytes if codes in step.outputs else 0
    )
    decomposed = step.update is not None and len(step.weight.shape) == 2  # stacks and convolutions have no directions
    factors = 3 * 4 * sum(step.update.shape) * step.update.rank * 2 if step.update and decomposed else 0
    return ARRAYS_PER_BLOCK * 4 * len(rows) * step.shape[1] + 3 * scales + held + factors
