"""Memory of a run: how many values of a weight are worked on at a time, to stay within ``--max-memory``, and what calibration
needs besides."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import mode

from qmerge.errors import RoomError
from qmerge.formats import get_format
from qmerge.recipe import parse_size
from qmerge.types import Step
from qmerge.weights.blocks import AMPLE_ENTRIES
from qmerge.weights.rows import row_blocks
from qmerge.weights.writing import COPY_BYTES

WEIGHTS_MEMORY = "2GB"
"""For the weights being worked on, where ``--max-memory`` is not given."""

FLOAT32_BYTES = 4

ARRAYS_PER_BLOCK = 16
"""float32 arrays of a block's size that a merge holds at its peak, temporaries of the metrics included (measured)."""

SCALE_COPIES = 3
"""Copies of the scales that are counted, temporaries included."""

FACTOR_COPIES = 3
"""Copies of an update's factors that are counted, temporaries of their decomposition included."""

MOST_ENTRIES = AMPLE_ENTRIES
"""Values per row block: larger blocks are not faster on a CPU."""

FEWEST_ENTRIES = 2**16
"""Values per row block: smaller blocks are slower."""

WAITING_WIDTHS = 4
"""Hidden states that a batch holds while it waits inside a decoder layer, besides the input that it waits with: the residual
stream before and after attention, and what attention's code still has in hand (measured on a Llama)."""

MATRICES = 6
"""float32 matrices [I, I] of the widest weight that calibration and preserve hold at their peak: H, K, K in another order, its
factor, and two temporary ones while it is factored (measured)."""


def calibration_memory(steps: Sequence[Step], tokens: int, *, sequential: bool) -> int:
    """Bytes that a calibration needs at its peak, besides ``step_memory``; an estimate from shapes.

    One decoder layer and the outputs of the one before are in memory, of all tokens at once.

    Args:
        steps: all steps of a plan.
        tokens: those that rounding learns from; where batches take turns, those of one batch.
        sequential: whether two models run.
    """
    widths = [step.shape[1] for step in steps if step.rounding == "preserve"]
    if not widths:
        return 0
    waiting = FLOAT32_BYTES * tokens * (WAITING_WIDTHS * mode(widths) + max(widths))
    models = 2 if sequential else 1
    layers: Counter[str] = Counter()
    outside = 0  # embeddings, output matrix
    for step in steps:
        layer = re.match(r".*?\.\d+\.", step.name)
        if layer is None:
            outside = max(outside, math.prod(step.shape))
        else:
            layers[layer[0]] += math.prod(step.shape)
    # The base is judged, too, when the other two still have the layer.
    layer_values = (models + 1) * max(layers.values(), default=0) + MATRICES * max(widths) ** 2
    return models * waiting + FLOAT32_BYTES * max(layer_values, 2 * outside)


def block_entries(steps: tuple[Step, ...], max_memory: str, workers: int) -> int:
    """How many values to work on at a time, so that every step stays within its share of the memory.

    Args:
        max_memory: size for all workers together, such as ``2GB``.

    Raises:
        RoomError: the largest weight does not fit even in the smallest row blocks.
    """
    budget = parse_size(max_memory) // workers
    entries = MOST_ENTRIES
    while entries > FEWEST_ENTRIES and any(step_memory(step, entries) > budget for step in steps):
        entries //= 2
    largest = max(steps, key=lambda step: step_memory(step, entries))
    needed = step_memory(largest, entries)
    if needed > budget:
        raise RoomError(
            f"{largest.name} needs {needed / 1e6:.1f} MB even in the smallest row blocks, but --max-memory {max_memory} "
            f"for {workers} workers leaves {budget / 1e6:.1f} MB: give more memory, or fewer --workers"
        )
    return entries


def step_memory(step: Step, entries: int) -> int:
    """Bytes of memory at a step's peak, with row blocks of about ``entries`` values."""
    if step.action == "copy":
        return COPY_BYTES
    block = next(row_blocks(step, entries))  # the first block is the largest
    arrays = ARRAYS_PER_BLOCK * FLOAT32_BYTES * len(block) * step.shape[1]
    return arrays + SCALE_COPIES * _scale_bytes(step) + _whole_codes_bytes(step) + _factor_bytes(step)


def _scale_bytes(step: Step) -> int:
    """Scales of the whole weight, in the source and in the output."""
    source, target = get_format(step.weight.format), get_format(step.target)
    source_codes = source.codes_part(step.weight.local)
    target_codes = step.weight.prefix + target.codes_part(step.weight.local)
    nbytes = 0
    for local, info in step.weight.parts.items():
        if local != source_codes:
            nbytes += info.nbytes
    for name, spec in step.outputs.items():
        is_text = spec.shape == (-1,)
        if name != target_codes and not is_text:
            nbytes += spec.nbytes
    return nbytes


def _whole_codes_bytes(step: Step) -> int:
    """Codes that are held for the whole weight, because its rows are columns on disk: as read; twice as written, once
    in blocks and once put together."""
    source, target = get_format(step.weight.format), get_format(step.target)
    target_codes = step.weight.prefix + target.codes_part(step.weight.local)
    # row_axis is 1 where rows are columns on disk, and 0 otherwise, where nothing is held.
    nbytes = source.info.row_axis * step.weight.nbytes
    if target_codes in step.outputs:
        nbytes += 2 * target.info.row_axis * step.outputs[target_codes].nbytes
    return nbytes


def _factor_bytes(step: Step) -> int:
    """The update's factors and their singular value decomposition, which only matrices have."""
    if step.update is None or len(step.weight.shape) != 2:
        return 0
    return FACTOR_COPIES * FLOAT32_BYTES * sum(step.update.shape) * step.update.rank * 2
