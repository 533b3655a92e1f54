"""Tensors of the output: copied, replaced, or the codes and scales of a rounded weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qmerge.formats import get_target
from qmerge.formats.base import TargetFormat
from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import TensorSink
from qmerge.types import TORCH_DTYPES, Step, TensorInfo, as_matrix
from qmerge.weights.finite import PARAMETERS, check_copied

COPY_BYTES = 2**22
"""Bytes that are copied at a time."""


def copy_bytes(step: Step, sink: TensorSink, reader: Reader) -> None:
    """Every part of the weight, byte for byte.

    Raises:
        NumbersError: a weight, or a scale of it, is NaN or infinity: every output of the model would be.
    """
    for info in step.weight.parts.values():
        for start in range(0, info.nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, info.nbytes)
            data = reader.bytes(info, start, stop)
            if step.weight.local in PARAMETERS:
                check_copied(data, info)
            sink.append_bytes(info.name, data)


def write_replacement(step: Step, values: Tensor, sink: TensorSink) -> None:
    """The adapter's own float32 values, cast once; in a GGUF file, on a fresh grid."""
    target = get_target(step.target)
    if target.info.is_quantized:
        shape = as_matrix(tuple(values.shape))
        matrix_OI = values.view(shape)
        grid = target.grid(target.scales(matrix_OI, step.options), shape, step.options)
        codes_OI = grid.nearest(matrix_OI)
        target.check_range(grid.decode(codes_OI), matrix_OI, step.name)
        sink.append(codes_name(step, target), target.pack(codes_OI, grid, step.options))
        return
    stored = values.to(TORCH_DTYPES[step.outputs[step.name].dtype])
    target.check_range(stored.float(), values, step.name)
    sink.append(step.name, stored)


class CodesSink:
    """Writes the codes of a step, row block by row block."""

    def __init__(self, step: Step, target: TargetFormat[Any], sink: TensorSink) -> None:
        self._step = step
        self._target = target
        self._sink = sink
        self._name = codes_name(step, target)
        self._waiting: list[Tensor] = []

    def pack(self, codes_OI: Tensor, grid: Grid) -> Tensor:
        """The codes of some rows, and their grid, as they are on disk."""
        codes = codes_OI
        if self._step.source.conv1d and self._target.info.is_dense:
            codes = codes_OI.T  # a dense Conv1D is stored as [I, O]; its one block has all rows
        return self._target.pack(codes, grid, self._step.options)

    def append(self, packed: Tensor) -> None:
        """Write the packed codes of the next rows."""
        if self._target.info.row_axis == 0:
            self._sink.append(self._name, packed)
        else:
            # The rows of the weight are columns on disk (GPTQ): they can be written when all of them are packed.
            self._waiting.append(packed)

    def finish(self) -> None:
        """No more rows follow."""
        if self._waiting:
            self._sink.append(self._name, torch.cat(self._waiting, dim=self._target.info.row_axis))


def write_scales(step: Step, target: TargetFormat[Any], grid: Grid, *, reader: Reader, sink: TensorSink) -> None:
    """The other parts: copied from the base where its grid is kept (with those that it lacks), else those of the grid."""
    kept: Mapping[str, TensorInfo] = {}
    # A grid that was made as in training has no scales on disk to copy.
    if step.source.keeps_grid and step.source.training_format is None:
        kept = step.weight.parts
    for info in kept.values():
        if info.name != codes_name(step, target):
            sink.append_bytes(info.name, reader.bytes(info, 0, info.nbytes))
    kept_names = {info.name for info in kept.values()}
    if kept_names >= step.outputs.keys():
        return  # the base has every part that the target's loaders look for
    for local, tensor in target.scale_tensors(grid, step.weight.local, step.shape, step.options).items():
        name = step.weight.prefix + local
        if name not in kept_names:
            sink.append(name, tensor)


def codes_name(step: Step, target: TargetFormat[Any]) -> str:
    """Full name of the output tensor that holds the codes."""
    return step.weight.prefix + target.codes_part(step.weight.local)
