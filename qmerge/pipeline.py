"""READ THIS FIRST: one weight at a time through the stages: dequantize, merge in float32, round, measure, write.

    for step in plan.steps:        # made from headers; whatever is wrong with the inputs has been raised before
        copy                       # bytes leave as they came
        convert                    # base → the target's grid → codes → bytes
        merge                      # base → + delta → the target's grid → codes → bytes; base, merged, stored compared

float32 values exist for some rows of one weight at a time, so memory grows neither with the model nor with its largest
weight. (``preserve`` also holds a few [I, I] matrices of what the layer's inputs look like, and one decoder layer while
``calibration.py`` collects them.) ``planning.py`` makes the steps, ``run.py`` walks them and publishes; ``checkpoint/``
reads and writes files; ``formats/``, ``adapters/``, ``rounding/`` and ``metrics/`` hold one plug-in per file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qmerge import plugins
from qmerge.adapters.combining.interference import PairSums, pair_stats
from qmerge.errors import NumbersError, RecipeError
from qmerge.formats import get_format
from qmerge.formats.base import Format, OnTheFly, Stored, Transposed
from qmerge.grids import Grid
from qmerge.metrics.base import Comparison, Sums, added, plain, sums_of
from qmerge.rounding.base import Metric, RoundingContext, Statistics, make_metric
from qmerge.safetensors_io.reader import MemoryReader, Reader
from qmerge.safetensors_io.writer import TensorSink
from qmerge.types import TORCH_DTYPES, Rows, Step, TensorInfo, Update, Weight

COPY_BYTES, AMPLE_ENTRIES = 2**22, 2**22

SAMPLED_GROUPS, SAMPLED_ENTRIES = 4, 2**12
"""Row groups of a weight that are looked at where a sample is enough, and values per group."""


@dataclass(frozen=True)
class RunContext:
    """Where and how the work is done: the same for every step."""

    reader: Reader
    device: torch.device
    seed: int
    block_entries: int


def compute_device(asked: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` → a device.

    Raises:
        RecipeError: cuda was asked for, and there is none.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    return torch.device(asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Outcome:
    """What came out of a merge: the sums of every metric, what ``preserve`` knew of the inputs, and how the deltas of
    several adapters met."""

    sums: Sums
    seen: dict[str, float] | None = None
    met: PairSums | None = None


def do(step: Step, sink: TensorSink, context: RunContext, inputs: Statistics | None = None) -> Outcome | None:
    """One step, start to end.

    Args:
        inputs: what calibration saw of the inputs of this weight.

    Returns:
        What came out, for a merge.

    Raises:
        NumbersError: NaN or infinity, in the base or after merging, or past the target's range.
    """
    if step.action == "copy":
        copy(step, sink, context.reader)
        return None
    if step.replacement is not None:
        put(step, step.replacement.values, sink)
        return None
    target = get_format(step.target)
    source, base = open_source(step, context)
    update = step.update.to(context.device) if step.update else None
    grid = source.grid if step.keeps_grid else fresh_grid(step, target, base, update, context, inputs)
    metric = metric_of(step, update, inputs, context)
    rounding = step.rounding if update is not None or metric is not None else "nearest"
    total, met = None, pair_stats(update)
    packed: list[Tensor] = []
    for rows in blocks(step, entries_for(step, context)):
        here = grid.rows(rows)
        near_OI = source.codes(rows) if step.keeps_grid else None
        base_OI = base.values(rows)
        merged_OI = merge(step, base_OI, update, rows)
        if met:
            met.see(base_OI, rows)
        delta_OI = merged_OI - base_OI if rounding == "preserve" and update is not None else None
        rounding_context = RoundingContext(
            step.name, rows, context.seed, near_OI, metric, delta_OI, beside(step, update, rows, context)
        )
        codes_OI: Tensor = plugins.load("rounding", rounding).choose(merged_OI, here, rounding_context)
        stored_OI = here.decode(codes_OI)
        target.check_range(stored_OI, merged_OI, step.name)
        packed.append(target.pack(as_on_disk(codes_OI, step, target), step.options))
        if target.row_axis == 0:
            sink.append(codes_name(step, target), packed.pop())
        if update is not None:
            base_codes_OI = here.nearest(base_OI) if near_OI is None else near_OI
            seen_II = metric.hessian_II if metric else None
            compared = Comparison(base_OI, merged_OI, stored_OI, base_codes_OI, codes_OI, here, rows, update, seen_II)
            total = added(total, sums_of(compared))
    if packed:  # rows are columns on disk: the codes are written when all are there
        sink.append(codes_name(step, target), torch.cat(packed, dim=target.row_axis))
    write_scales(step, target, grid, sink, context.reader)
    return Outcome(plain(total), seen_of(inputs, metric), met.sums() if met else None) if total else None


def entries_for(step: Step, context: RunContext) -> int:
    """``preserve`` factors its metric for every row block: fewer and larger ones, unless memory is short."""
    ample = step.rounding == "preserve" and context.block_entries >= AMPLE_ENTRIES
    return 4 * context.block_entries if ample else context.block_entries


def seen_of(inputs: Statistics | None, metric: Metric | None) -> dict[str, float] | None:
    if metric is None:
        return None
    tokens, borrowed = (inputs.tokens, inputs.borrowed) if inputs else (0, 0.0)
    return {"tokens": tokens, "borrowed": borrowed, "damping": metric.damping}


def copy(step: Step, sink: TensorSink, reader: Reader) -> None:
    """Every part of the weight, byte for byte."""
    for info in step.weight.parts.values():
        for start in range(0, info.nbytes, COPY_BYTES):
            sink.append_bytes(info.name, reader.bytes(info, start, min(start + COPY_BYTES, info.nbytes)))


def put(step: Step, values: Tensor, sink: TensorSink) -> None:
    """The adapter's own values, cast once."""
    target = get_format(step.target)
    stored = values.to(TORCH_DTYPES[step.outputs[step.name].dtype])
    target.check_range(stored.float(), values, step.name)
    sink.append(step.name, stored)


def open_source(step: Step, context: RunContext) -> tuple[Stored, Stored]:
    """(what gives the grid and the base's codes, what gives the values to merge onto)."""
    source = open_weight(step.weight, step, context)
    if step.trained_on:
        name, options = step.trained_on
        simulated = OnTheFly(source, step.shape, get_format(name), options, list(blocks(step, context.block_entries)))
        return simulated, source if step.onto_original else simulated
    return source, open_weight(step.original, step, context) if step.original else source


def open_weight(weight: Weight, step: Step, context: RunContext) -> Stored:
    form = get_format(weight.format)
    stored = form.open(weight, context.reader, context.device)
    return Transposed(stored, step.shape[1]) if step.conv1d and form.dense_dtype else stored


def dense_values(weight: Weight, reader: Reader, device: torch.device, conv1d: bool = False) -> Tensor:
    """float32 values of a whole weight, in the shape that a dense checkpoint gives it (``conv1d``: [I, O])."""
    form = get_format(weight.format)
    rows = weight.shape[0] if len(weight.shape) > 1 else 1
    values = form.open(weight, reader, device).values(Rows(0, rows)).view(weight.shape)
    return values.T.contiguous() if conv1d and not form.dense_dtype else values


def worked_values(step: Step, context: RunContext, with_delta: bool = True) -> Tensor:
    """float32 [O, I]: what the adapter is merged into, whole; with the delta, what the adapter model computes with."""
    _, base = open_source(step, context)
    rows = Rows(0, step.shape[0])
    base_OI = base.values(rows)
    return step.update.to(context.device).apply(base_OI, rows) if step.update and with_delta else base_OI


def unmerged_values(step: Step, context: RunContext, conv1d: bool = False, with_delta: bool = True) -> Tensor:
    """The same in the shape of a dense checkpoint."""
    if step.replacement is not None and with_delta:
        return step.replacement.values.to(context.device)
    if step.action in ("copy", "replace"):
        return dense_values(step.weight, context.reader, context.device, conv1d)
    values_OI = worked_values(step, context, with_delta)
    worked_on_OI = step.conv1d or not step.source_is_dense
    return values_OI.T.contiguous() if conv1d and worked_on_OI else values_OI.view(step.weight.shape)


def stored_values(step: Step, read: Callable[[str], bytes], context: RunContext) -> Tensor:
    """float32 [O, I] that a loader will read of a step that is done; ``read`` gives the bytes of an output tensor."""
    target = get_format(step.target)
    prefix, parts = step.weight.prefix, {}
    for name, spec in step.outputs.items():
        shape = spec.shape if spec.shape != (-1,) else (len(read(name)),)
        parts[name.removeprefix(prefix)] = TensorInfo(spec.dtype, shape, name, Path(), 0)
    on_disk = step.shape[::-1] if step.conv1d and target.dense_dtype else step.shape
    weight = replace(step.weight, format=step.target, shape=on_disk, parts=parts, options=step.options)
    with MemoryReader(read) as reader:
        return open_weight(weight, step, replace(context, reader=reader)).values(Rows(0, step.shape[0]))


def fresh_grid(
    step: Step, target: Format, base: Stored, update: Update | None, context: RunContext, inputs: Statistics | None = None
) -> Grid:  # fmt: skip
    """A grid whose scales fit the merged values, as the format's own library would choose them, or better: some formats
    weight errors by the inputs that calibration saw."""
    inputs_I = inputs.hessian_II.diagonal().to(context.device) if inputs else None
    scales = [torch.empty(0, device=context.device)]
    if target.needs_scales:
        for rows in blocks(step, context.block_entries):
            scales.append(target.scales(merge(step, base.values(rows), update, rows), step.options, inputs_I))
    return target.grid(torch.cat(scales), step.shape, step.options, inputs_I)


def merge(step: Step, base_OI: Tensor, update: Update | None, rows: Rows) -> Tensor:
    """base + delta in float32, added once."""
    if update is None:
        if bool(base_OI.isnan().any()):
            raise NumbersError(f"{step.name}: the base holds NaN; it is damaged, download it again")
        return base_OI
    merged_OI = update.apply(base_OI, rows)
    if not bool(merged_OI.isfinite().all()):
        raise NumbersError(
            f"{step.name}: the base or the merged weight holds NaN or infinity; nothing good can be stored"
        )
    return merged_OI


def metric_of(step: Step, update: Update | None, inputs: Statistics | None, context: RunContext) -> Metric | None:
    """None where nothing says which errors matter: neither an adapter nor inputs that calibration saw."""
    if step.rounding != "preserve" or (update is None and inputs is None):
        return None
    # A fresh grid dithers: its errors do not add up along the delta, so what the adapter reads needs no favour there
    # (benchmarks/gptq_vs_gptqmodel.py: the KL is an eighth lower without).
    favoured = update is not None and (step.keeps_grid or inputs is None)
    return make_metric(inputs, update.directions() if update and favoured else None, step.shape[1], context.device)


def beside(step: Step, update: Update | None, rows: Rows, context: RunContext) -> Tensor | None:
    """The 16-bit weight with the delta, where it is given beside a quantized base that is merged onto."""
    if step.beside is None or update is None:
        return None
    return update.apply(open_weight(step.beside, step, context).values(rows), rows)


def as_on_disk(codes_OI: Tensor, step: Step, target: Format) -> Tensor:
    return codes_OI.T if step.conv1d and target.dense_dtype else codes_OI


def write_scales(step: Step, target: Format, grid: Grid, sink: TensorSink, reader: Reader) -> None:
    """The other parts: the base's own bytes where its grid is kept (what it lacks is added), else those of the grid."""
    kept: Mapping[str, TensorInfo] = step.weight.parts if step.keeps_grid and not step.trained_on else {}
    codes = codes_name(step, target)
    for info in kept.values():
        if info.name != codes:
            sink.append_bytes(info.name, reader.bytes(info, 0, info.nbytes))
    own = {info.name for info in kept.values()}
    if own >= step.outputs.keys():
        return
    for name, part in target.scale_tensors(grid, step.weight.local, step.shape, step.options).items():
        if step.weight.prefix + name not in own:
            sink.append(step.weight.prefix + name, part)


def codes_name(step: Step, target: Format) -> str:
    """Full name of the output tensor with the codes."""
    return step.weight.prefix + target.codes_part(step.weight.local)


def blocks(step: Step, entries: int) -> Iterator[Rows]:
    """Row blocks of about ``entries`` values; a weight that is transposed on the way, or whose rows depend on one another,
    goes in one."""
    rows, columns = step.shape
    whole = step.conv1d or (step.update is not None and step.update.whole)
    count = rows if whole else max(1, entries // max(1, columns))
    unit = row_step(step)
    count = max(unit, count // unit * unit)
    for start in range(0, rows, count):
        yield Rows(start, min(start + count, rows))


def row_step(step: Step) -> int:
    """The least common multiple of what the formats of a step need."""
    named = [
        (step.target, step.options),
        (step.weight.format, step.weight.options),
        *([step.trained_on] if step.trained_on else []),
    ]
    return math.lcm(*(get_format(name).row_step(step.shape, options) for name, options in named))


def row_groups(step: Step, entries: int = SAMPLED_ENTRIES) -> list[Rows]:
    """A few groups of rows, spread over the weight, of about ``entries`` values each."""
    rows, columns = step.shape
    unit = row_step(step)
    if step.update and step.update.whole:
        return [Rows(0, rows)]
    size = max(unit, entries // max(1, columns) // unit * unit)
    if size * SAMPLED_GROUPS >= rows:
        return [Rows(0, rows)]
    starts = {i * (rows - size) // (SAMPLED_GROUPS - 1) // unit * unit for i in range(SAMPLED_GROUPS)}
    return [Rows(start, min(start + size, rows)) for start in sorted(starts)]
