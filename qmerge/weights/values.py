"""float32 values of weights: as they are stored, with the delta, and as they were written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from qmerge.formats import get_format, get_target
from qmerge.formats.base import OnTheFly, Stored, Transposed
from qmerge.safetensors_io.reader import MemoryReader, Reader
from qmerge.types import Replacement, Rows, Step, TensorInfo, Weight
from qmerge.weights.context import RunContext
from qmerge.weights.rows import row_blocks


@dataclass(frozen=True)
class OpenSource:
    """The source of a step, open for reading.

    stored  has the grid that may be kept, and the base's codes on it
    base    has the values that the delta is added to
    """

    stored: Stored
    base: Stored


def open_source(step: Step, context: RunContext) -> OpenSource:
    """Open the weights that a step reads; quantize them as in training where the step asks for it."""
    source = step.source
    base = open_weight(source.weight, step, context)
    stored = base
    training = source.training_format
    if training is not None:
        blocks = list(row_blocks(step, context.block_entries))
        fmt = get_target(training.format)
        stored = OnTheFly(base, step.shape, fmt, options=training.options, blocks=blocks)
    # Merging onto the original: the other weight gives the grid only.
    if source.base_weight is not source.weight:
        base = open_weight(source.base_weight, step, context)
    elif source.simulates_training:
        base = stored
    return OpenSource(stored, base)


def open_weight(weight: Weight, step: Step, context: RunContext) -> Stored:
    """Open a weight for reading by rows, as [O, I] whatever its orientation on disk.

    Args:
        weight: a weight that ``step`` reads or has written.
    """
    fmt = get_format(weight.format)
    if step.source.transposed_stack:
        return fmt.open_matrices(weight, context.reader, context.device)
    stored = fmt.open(weight, context.reader, context.device)
    # Only the dense form of a Conv1D is [I, O]: formats store codes as [O, I].
    if step.source.conv1d and fmt.info.is_dense:
        return Transposed(stored, step.shape[1])
    return stored


def dense_values(weight: Weight, reader: Reader, device: torch.device, conv1d: bool = False) -> Tensor:
    """float32 values of a whole weight, in the shape of a dense checkpoint.

    Args:
        conv1d: the weight is that of a Conv1D, which a dense checkpoint stores as [I, O].
    """
    fmt = get_format(weight.format)
    rows = weight.shape[0] if len(weight.shape) > 1 else 1
    values = fmt.open(weight, reader, device).values(Rows(0, rows)).view(weight.shape)
    if conv1d and not fmt.info.is_dense:
        return values.T.contiguous()
    return values


def base_values(step: Step, context: RunContext) -> Tensor:
    """float32 [O, I]: the whole weight that the delta is added to."""
    return open_source(step, context).base.values(Rows(0, step.shape[0]))


def merged_values(step: Step, context: RunContext) -> Tensor:
    """float32 [O, I]: the whole weight with the delta, before rounding; without a delta, the base's values."""
    base_OI = base_values(step, context)
    if step.update is None:
        return base_OI
    return step.update.to(context.device).apply(base_OI, Rows(0, step.shape[0]))


def unmerged_values(step: Step, context: RunContext, conv1d: bool = False, with_delta: bool = True) -> Tensor:
    """float32 values that the unmerged adapter model computes with, in the shape of a dense checkpoint.

    Args:
        conv1d: the weight is that of a Conv1D, which a dense checkpoint stores as [I, O].
        with_delta: False for the values of the base alone.
    """
    if step.replacement is not None and with_delta:
        return step.replacement.values.to(context.device)
    # These weights are not worked on as [O, I]: their values are those on disk.
    if step.action in ("copy", "replace"):
        values = dense_values(step.weight, context.reader, context.device, conv1d)
        if step.replacement is None or len(step.replacement.values) == len(values):
            return values
        return _with_rows_of(step.replacement, values)
    values_OI = merged_values(step, context) if with_delta else base_values(step, context)
    if step.source.transposed_stack:
        return in_dense_shape(values_OI, step)
    is_OI = step.source.conv1d or not step.source_is_dense
    if conv1d and is_OI:
        return values_OI.T.contiguous()
    return values_OI.view(step.weight.shape)


def _with_rows_of(replacement: Replacement, values: Tensor) -> Tensor:
    """The base's values with as many rows as those that replace them: an adapter may resize the vocabulary.

    Rows that the base does not have are the adapter's own. So base and adapter model read and predict the same tokens, and
    differ in what the base has.
    """
    shared = min(len(values), len(replacement.values))
    return torch.cat([values[:shared], replacement.values[shared:].to(values)])


def in_dense_shape(values_OI: Tensor, step: Step) -> Tensor:
    """Values of a step, but not those of a Conv1D, in the shape of a dense checkpoint."""
    if not step.source.transposed_stack:
        return values_OI.view(step.weight.shape)
    experts, columns, rows = step.weight.shape
    return values_OI.view(experts, rows, columns).transpose(1, 2).contiguous()


def stored_values(step: Step, read: Callable[[str], bytes], context: RunContext) -> Tensor:
    """float32 [O, I] that a loader reads from the output of a step that is done.

    Args:
        read: name of an output tensor → its bytes.
    """
    target = get_format(step.target)
    parts: dict[str, TensorInfo] = {}
    for name, spec in step.outputs.items():
        shape = spec.shape
        if shape == (-1,):
            shape = (len(read(name)),)  # a text, whose length was not planned
        # The reader asks for the bytes by name: file and offset are not used.
        info = TensorInfo(dtype=spec.dtype, shape=shape, name=name, file=Path(), offset=0)
        parts[name.removeprefix(step.weight.prefix)] = info
    on_disk: tuple[int, ...] = step.shape
    if step.source.transposed_stack:
        on_disk = step.weight.shape
    elif step.source.conv1d and target.info.is_dense:
        on_disk = step.shape[::-1]
    weight = replace(step.weight, format=step.target, shape=on_disk, parts=parts, options=step.options)
    with MemoryReader(read) as reader:
        written = open_weight(weight, step, replace(context, reader=reader))
        return written.values(Rows(0, step.shape[0]))
