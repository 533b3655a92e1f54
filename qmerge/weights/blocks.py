"""How large the row blocks of a step are, and how many are worked on at once."""

from __future__ import annotations

import math

from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.weights.parallel import cpu_threads
from qmerge.weights.rows import row_blocks

AMPLE_ENTRIES = 2**22
"""Values per row block where memory is not short."""

CACHED_ENTRIES = 2**18
"""Values per row block that stay in a CPU's cache from one operation to the next."""


def entries_per_block(step: Step, context: RunContext) -> int:
    """Values per row block. ``preserve`` factors its objective once per block: it gets fewer and larger ones, unless
    memory is short."""
    if step.rounding != "preserve":
        return cached_entries(context)
    if context.block_entries >= AMPLE_ENTRIES:
        return 4 * context.block_entries
    return context.block_entries


def uses_block_threads(step: Step, context: RunContext) -> bool:
    """Whether row blocks are small, one for each core. Those of ``preserve`` and of a GPU are large, one after the other."""
    return step.rounding != "preserve" and context.device.type == "cpu"


def blocks_at_once(step: Step, context: RunContext) -> int:
    """Row blocks to work on at once: one for each core, as far as they take no more memory than one of the largest blocks."""
    block = next(row_blocks(step, cached_entries(context)))  # the largest; blocks that span rows may be large
    entries = max(CACHED_ENTRIES, len(block) * math.prod(step.shape[1:]))
    fitting = context.block_entries // entries - 1  # one more waits to be written
    return max(1, min(fitting, cpu_threads()))


def cached_entries(context: RunContext) -> int:
    """Values per row block for work that goes over each of them a few times."""
    if context.device.type == "cpu":
        return min(context.block_entries, CACHED_ENTRIES)
    return context.block_entries
