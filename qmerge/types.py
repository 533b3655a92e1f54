"""The nouns: what lies on disk, what will be done with it, and what came out.

Shapes stand in names, as suffixes: O out features, I in features, R rank, B blocks (NF4) or groups (GPTQ), L levels.
``base_OI`` is a float32 tensor [out features, in features]. Everything here is data; nothing here opens a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Local name inside the module (``weight``, ``weight.absmax``, ``SCB``) → tensor as it lies on disk."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors dtype → torch dtype, for the dtypes that qmerge computes with; any other is copied as bytes."""

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

BITS = {
    **{name: dtype.itemsize * 8 for name, dtype in TORCH_DTYPES.items()},
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""Bits per element of every safetensors dtype (safetensors 0.8, tensor.rs)."""


@dataclass(frozen=True)
class TensorSpec:
    """dtype (safetensors spelling) and shape of a tensor on disk."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class TensorInfo(TensorSpec):
    """A tensor and where its bytes lie: ``file``, from ``offset`` on (counted from the start of the file)."""

    name: str
    file: Path
    offset: int


class Options(Protocol):
    """How one format stores one weight: a frozen dataclass that belongs to the format (empty for most)."""


@dataclass(frozen=True)
class Weight:
    """One logical matrix (or vector), however many tensors store it.

    ``shape`` is the shape of the values as stored: (O, I) for a linear layer, (I, O) for a dense Conv1D.
    """

    module: str
    local: str
    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    options: Options

    @property
    def name(self) -> str:
        return self.prefix + self.local

    @property
    def prefix(self) -> str:
        """What stands before the local names of its parts."""
        return f"{self.module}." if self.module else ""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts.values())

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_itself(self) -> bool:
        """Whether its parts on disk are its own: an output embedding that was tied is read from the input embedding."""
        return all(info.name == self.prefix + local for local, info in self.parts.items())


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` … ``stop`` of a matrix: the unit in which weights larger than the budget are worked on."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Update(Protocol):
    """What an adapter does to one weight. One per adapted weight; knows nothing of files."""

    @property
    def whole(self) -> bool:
        """Whether a row of the result depends on other rows of the base, so that it cannot be made in row blocks."""

    @property
    def rank(self) -> int: ...

    @property
    def scale(self) -> float: ...

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight it belongs to."""

    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        """float32 [rows, I] of the base → float32 [rows, I] merged; the input is not changed."""

    def to(self, device: torch.device) -> Update:
        """The same on another device."""

    def row_norms(self) -> Tensor | None:
        """float32 [O]: ‖delta‖ of every row, from the small factors; None where the delta depends on the base."""

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """float32 u [O, R], s [R], v [I, R] of the delta's singular value decomposition; None when it has none."""


@dataclass(frozen=True)
class Replacement:
    """float32 values that were trained whole (``modules_to_save``, biases): they take the place of the base's."""

    values: Tensor


Action = Literal["copy", "convert", "merge", "replace"]


@dataclass(frozen=True)
class Step:
    """What happens to one weight.

    ``copy``     bytes leave as they came;
    ``convert``  another format, no delta;
    ``merge``    the adapter's update is applied;
    ``replace``  the adapter has values of its own.
    ``outputs``  full tensor name → dtype and shape; a shape of (-1,) is a short text whose length is known at the end.
    ``keeps_grid``  the target is stored on the base's own scales;
    ``trained_on``  a dense weight is first quantized this way, as it was on the fly in training;
    ``original``    values come from this weight, the grid from ``weight`` (merge onto the original);
    ``onto_original``  with ``trained_on``: values are the dense ones, only the grid is that of training;
    ``conv1d``      dense weights of this module lie as [I, O] (GPT-2); all work is done as [O, I];
    ``rounding``    how codes are chosen (``auto`` until it is settled);
    ``beside``      the 16-bit weight, which ``preserve`` may lean on while merging onto the quantized one.
    """

    weight: Weight
    action: Action
    target: str
    options: Options
    outputs: Mapping[str, TensorSpec]
    update: Update | None = None
    keeps_grid: bool = False
    trained_on: tuple[str, Options] | None = None
    onto_original: bool = False
    original: Weight | None = None
    conv1d: bool = False
    rounding: str = "nearest"
    beside: Weight | None = None
    replacement: Replacement | None = None

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def label(self) -> str:
        """What reports call it: the module, or the whole name where the module has more to it than its weight."""
        return self.weight.module if self.weight.local == "weight" else self.name

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the values as they are worked on; a vector is one row."""
        rows, columns = as_matrix(self.weight.shape)
        return (columns, rows) if self.conv1d and self.source_is_dense else (rows, columns)

    @property
    def source_is_dense(self) -> bool:
        return len(self.weight.parts) == 1  # a quantized weight has scales beside it


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) that a weight is worked on as: stacks and convolutions by their first axis, a vector as one row."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def dot(a_OI: Tensor, b_OI: Tensor) -> float:
    """⟨a, b⟩: float32 within a row, float64 across rows, so that it does not depend on how rows were grouped."""
    return float(torch.linalg.vecdot(a_OI, b_OI, dim=-1).double().sum())
