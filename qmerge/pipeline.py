"""READ THIS FIRST: one weight at a time through the stages: dequantize, merge in float32, round, measure, write.

    for step in plan.steps:        # planned from headers, which has already raised every error in the inputs
        copy                       # bytes are copied
        replace                    # the adapter's own values → bytes
        convert                    # base → the target's grid → codes → bytes
        merge                      # base → + delta → the target's grid → codes → bytes, and measured

float32 values exist for some rows of one weight at a time, so memory grows neither with the model nor with its largest
weight. (``preserve`` also holds a few [I, I] matrices of statistics of the layer's inputs, and one decoder layer while
``calibration/`` collects them.) ``planning/`` makes the steps; ``run/`` runs them and publishes the files; ``weights/``
reads float32 values and writes tensors; ``checkpoint/`` and ``safetensors_io/`` read and write files; ``formats/``, ``adapters/``,
``rounding/`` and ``metrics/`` hold one plug-in per file.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qmerge.adapters.combining.interference import PairSums, pair_stats
from qmerge.adapters.updates.transposed_stack import TransposedStackUpdate, matrices_of
from qmerge.formats import get_target
from qmerge.formats.base import TargetFormat
from qmerge.grids import Grid
from qmerge.metrics.base import MergedRows, Sums, added, plain, sums_of
from qmerge.rounding import get_rounding
from qmerge.rounding.base import EFFORTS, InputStatistics, Objective, RoundingContext, make_objective
from qmerge.safetensors_io.writer import TensorSink
from qmerge.types import Rows, Step, Update
from qmerge.weights.blocks import blocks_at_once, cached_entries, entries_per_block, uses_block_threads
from qmerge.weights.context import RunContext
from qmerge.weights.finite import PARAMETERS, check_merged
from qmerge.weights.heap import keep_freed_memory
from qmerge.weights.parallel import map_blocks, one_torch_thread
from qmerge.weights.rows import row_blocks
from qmerge.weights.values import OpenSource, open_source, open_weight
from qmerge.weights.writing import CodesSink, copy_bytes, write_replacement, write_scales


@dataclass(frozen=True)
class Outcome:
    """What was measured while one weight was merged.

    sums         the sums of every metric
    input_stats  tokens that calibration saw, and more, for ``preserve`` (``qmerge.schema.SeenRecord``)
    pair_sums    how the deltas of several adapters overlap
    """

    sums: Sums
    input_stats: dict[str, float] | None = None
    pair_sums: PairSums | None = None


# --- the steps -------------------------------------------------------------------------------------------------------


def run_step(
    step: Step, sink: TensorSink, context: RunContext, inputs: InputStatistics | None = None
) -> Outcome | None:
    """One step, start to end: every tensor in ``step.outputs`` goes into ``sink``.

    Args:
        inputs: statistics of the inputs of this weight, from calibration.

    Returns:
        What was measured, for a merge; None for any other action.

    Raises:
        NumbersError: NaN or infinity in the base or after merging, or values that are out of the target's range.
    """
    if step.action == "copy":
        copy_bytes(step, sink, context.reader)
        return None
    if step.replacement is not None:
        write_replacement(step, step.replacement.values, sink)
        return None
    return convert_or_merge(step, sink, context, inputs)


def convert_or_merge(
    step: Step, sink: TensorSink, context: RunContext, inputs: InputStatistics | None
) -> Outcome | None:
    """base → + delta → the target's grid → codes → bytes, some rows at a time. A conversion has no delta to measure."""
    if uses_block_threads(step, context):
        keep_freed_memory()
        with one_torch_thread():
            return round_weight(step, sink, context, inputs, threads=blocks_at_once(step, context))
    return round_weight(step, sink, context, inputs, threads=1)


def round_weight(
    step: Step, sink: TensorSink, context: RunContext, inputs: InputStatistics | None, *, threads: int
) -> Outcome | None:
    """The same, with so many row blocks at once."""
    work = open_step(step, context, inputs, threads)
    codes_sink = CodesSink(step, work.target, sink)
    measurement = Measurement(work)

    def round_block(rows: Rows) -> RoundedBlock:
        # Dequantize, and add the delta in float32.
        block = read_block(work, rows)
        # Round. This happens once, however many adapters there are.
        codes_OI = choose_codes(work, block)
        # Decode what was rounded, so that the measured values are those that a loader will read.
        stored_OI = block.grid.decode(codes_OI)
        work.target.check_range(stored_OI, block.merged_OI, step.name)
        return RoundedBlock(block, codes_sink.pack(codes_OI, block.grid), measurement.sums(block, codes_OI, stored_OI))

    with closing(
        map_blocks(round_block, row_blocks(step, entries_per_block(step, context)), threads)
    ) as rounded_blocks:
        for rounded in rounded_blocks:
            codes_sink.append(rounded.packed)
            measurement.add(rounded)
    codes_sink.finish()
    write_scales(step, work.target, work.grid, reader=context.reader, sink=sink)
    return measurement.outcome(inputs)


# --- dequantize, merge -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step that is being done: everything that its row blocks share.

    grid       grid of the whole weight that codes are chosen on
    inputs     statistics of the inputs, from calibration
    objective  which rounding errors matter, for ``preserve``; of a stack, those of each block are in the block
    rounding   name of the rounding that is used
    """

    step: Step
    context: RunContext
    source: OpenSource
    target: TargetFormat[Any]
    update: Update | None
    grid: Grid
    inputs: InputStatistics | None
    objective: Objective | None
    rounding: str


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows of a weight before rounding, float32 [rows, I], with their part of the grid.

    kept_codes_OI  the base's own codes, where its grid is kept
    objective      that of the weight; in a stack, that of the matrix that the block is
    """

    rows: Rows
    grid: Grid
    base_OI: Tensor
    merged_OI: Tensor
    kept_codes_OI: Tensor | None
    objective: Objective | None


@dataclass(frozen=True)
class RoundedBlock:
    """Some rows after rounding: ``packed`` for the disk, and measured (None without an update)."""

    block: Block
    packed: Tensor
    sums: Sums | None


def open_step(step: Step, context: RunContext, inputs: InputStatistics | None, threads: int = 1) -> Work:
    """Open the source, and settle the grid and the objective for the whole weight."""
    source = open_source(step, context)
    update = step.update.to(context.device) if step.update else None
    rounding = step.rounding
    objective = objective_for(step, update, inputs, context)
    if update is None and objective is None:
        # Nothing tells preserve which errors matter, and no delta can get lost: nearest makes the smallest errors.
        rounding = "nearest"
    return Work(
        step=step,
        context=context,
        source=source,
        target=get_target(step.target),
        update=update,
        grid=choose_grid(step, source, update, context=context, inputs=inputs, threads=threads),
        inputs=inputs,
        objective=objective,
        rounding=rounding,
    )


def read_block(work: Work, rows: Rows) -> Block:
    """Dequantize some rows and add the delta."""
    grid = work.grid.rows(rows)
    kept_codes_OI = None
    if work.step.source.keeps_grid:
        kept_codes_OI = work.source.stored.codes(rows)
    if kept_codes_OI is not None and work.source.base is work.source.stored:
        base_OI = grid.decode(kept_codes_OI)  # not read again
    else:
        base_OI = work.source.base.values(rows)
    return Block(
        rows=rows,
        grid=grid,
        base_OI=base_OI,
        merged_OI=add_delta(work.step, base_OI, work.update, rows),
        kept_codes_OI=kept_codes_OI,
        objective=objective_of_block(work, rows),
    )


def add_delta(step: Step, base_OI: Tensor, update: Update | None, rows: Rows) -> Tensor:
    """base + delta in float32; the base itself where there is no update.

    Raises:
        NumbersError: NaN, infinity, or values past ``LARGEST_VALUE`` in the base or after merging.
    """
    merged_OI = base_OI if update is None else update.apply(base_OI, rows)
    # A mask may hold infinity, where it stays dense.
    if update is not None or get_target(step.target).info.is_quantized or step.weight.local in PARAMETERS:
        check_merged(merged_OI, step.name)
    return merged_OI


# --- grid, round -----------------------------------------------------------------------------------------------------


def choose_grid(
    step: Step,
    source: OpenSource,
    update: Update | None,
    *,
    context: RunContext,
    inputs: InputStatistics | None,
    threads: int = 1,
) -> Grid:
    """The grid of the whole weight: the base's where it is kept, else a fresh one.

    The scales of a fresh grid fit the merged values. They are chosen as the format's own library chooses them, or
    better: some formats weight errors by the mean squares of the inputs that calibration saw.
    """
    if step.source.keeps_grid:
        return source.stored.grid
    target = get_target(step.target)
    inputs_I = None
    if inputs is not None:
        inputs_I = inputs.hessian_II.diagonal().to(context.device)
    scales: list[Tensor] = []
    if target.info.is_quantized:
        # The scales come from all rows, so the weight is read twice; keeping it would take the memory of a whole weight.
        def scales_of(rows: Rows) -> Tensor:
            merged_OI = add_delta(step, source.base.values(rows), update, rows)
            return target.scales(merged_OI, step.options, inputs_I)

        scales += map_blocks(scales_of, row_blocks(step, cached_entries(context)), threads)
    no_scales = torch.empty(0, device=context.device)  # of a dense target
    return target.grid(torch.cat(scales) if scales else no_scales, step.shape, step.options, inputs_I)


def objective_for(
    step: Step, update: Update | None, inputs: InputStatistics | None, context: RunContext
) -> Objective | None:
    """The objective that ``preserve`` minimizes.

    None for other roundings, and where neither an adapter nor calibration tells which errors matter.
    """
    if step.rounding != "preserve":
        return None
    if update is None and inputs is None:
        return None
    directions = None
    # On a fresh grid with calibration, errors do not add up along the delta. There the directions that the adapter reads
    # get no extra weight: the KL is an eighth lower without (benchmarks/gptq_vs_gptqmodel.py).
    if update is not None and (step.source.keeps_grid or inputs is None):
        directions = update.directions()
    return make_objective(inputs, directions, step.shape[1], context.device)


def objective_of_block(work: Work, rows: Rows) -> Objective | None:
    """The objective of some rows. Every matrix of a stack has its own inputs, and its own delta."""
    if work.objective is None or not isinstance(work.update, TransposedStackUpdate):
        return work.objective
    number = rows.start // len(rows)
    inputs = None
    if work.inputs is not None:
        inputs = work.inputs.of_matrices[number] or work.inputs
    directions = None
    if work.step.source.keeps_grid or inputs is None:
        directions = work.update.matrix_directions(number)
    return make_objective(inputs, directions, work.step.shape[1], work.context.device)


def choose_codes(work: Work, block: Block) -> Tensor:
    """Codes on the block's grid, [rows, I], by the step's rounding."""
    delta_OI = None
    if work.rounding == "preserve" and work.update is not None:  # the other roundings do not use it
        delta_OI = block.merged_OI - block.base_OI
    context = RoundingContext(
        name=work.step.name,
        rows=block.rows,
        seed=work.context.seed,
        effort=EFFORTS[work.context.effort],
        base_codes_OI=block.kept_codes_OI,
        objective=block.objective,
        delta_OI=delta_OI,
        original_OI=original_with_delta(work, block.rows),
    )
    return get_rounding(work.rounding).choose(block.merged_OI, block.grid, context)


def original_with_delta(work: Work, rows: Rows) -> Tensor | None:
    """The 16-bit weight with the delta, where it is known while the delta is added to the quantized one."""
    source = work.step.source
    if source.merges_onto_original:
        return None  # then the base is the original
    if work.update is None or source.original_weight is None:
        return None
    original_OI = open_weight(source.original_weight, work.step, work.context).values(rows)
    return work.update.apply(original_OI, rows)


# --- measure ---------------------------------------------------------------------------------------------------------


class Measurement:
    """Adds up the sums of all metrics over the row blocks of one merged weight; measures nothing without an update."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._sums: Sums | None = None
        self._pairs = pair_stats(work.update)

    def sums(self, block: Block, codes_OI: Tensor, stored_OI: Tensor) -> Sums | None:
        """Compare base, merged and stored values of some rows."""
        update = self._work.update
        if update is None:
            return None
        base_codes_OI = block.kept_codes_OI
        if base_codes_OI is None:
            # A fresh grid is that of the merged values: the base's codes on it are compared to count changed codes.
            base_codes_OI = block.grid.nearest(block.base_OI)
        merged_rows = MergedRows(
            base_OI=block.base_OI,
            merged_OI=block.merged_OI,
            stored_OI=stored_OI,
            base_codes_OI=base_codes_OI,
            codes_OI=codes_OI,
            grid=block.grid,
            position=block.rows,
            weight_rows=self._work.step.shape[0],
            update=update,
            hessian_II=block.objective.hessian_II if block.objective else None,
            matrices=matrices_of(update),
        )
        return sums_of(merged_rows)

    def add(self, rounded: RoundedBlock) -> None:
        """Add the sums of the next rows."""
        if rounded.sums is None:
            return
        self._sums = added(self._sums, rounded.sums)
        if self._pairs:
            self._pairs.add(rounded.block.base_OI, rounded.block.rows)

    def outcome(self, inputs: InputStatistics | None) -> Outcome | None:
        """The sums over all rows; None without an update."""
        if self._sums is None:
            return None
        pair_sums = None
        if self._pairs:
            pair_sums = self._pairs.sums()
        return Outcome(plain(self._sums), self._input_stats(inputs), pair_sums)

    def _input_stats(self, inputs: InputStatistics | None) -> dict[str, float] | None:
        if self._work.objective is None:
            return None
        damping = self._work.objective.damping
        if inputs is None:
            return {"tokens": 0, "borrowed": 0.0, "damping": damping}
        return {"tokens": inputs.tokens, "borrowed": inputs.borrowed, "damping": damping}
