"""The data types of a merge: tensors on disk, weights, and the steps that are planned for them. Nothing here opens a
file.

Names carry shapes as suffixes: O out features, I in features, R rank, B blocks (NF4) or groups (GPTQ), L levels.
``base_OI`` is a float32 tensor [out features, in features].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import torch
from torch import Tensor

Parts = dict[str, Tensor]
"""Local name inside the module (``weight``, ``weight.absmax``, ``SCB``) → tensor as stored on disk."""

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors dtype → torch dtype, for the dtypes that qmerge computes with. Tensors of other dtypes are copied as
bytes."""

SAFETENSORS_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}

DENSE_FORMATS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
"""safetensors dtype → name of the dense format."""

BITS = {
    **{name: dtype.itemsize * 8 for name, dtype in TORCH_DTYPES.items()},
    "U16": 16,
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
        """Bytes on disk."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True, kw_only=True)
class TensorInfo(TensorSpec):
    """A tensor on disk: its bytes are in ``file``, from ``offset`` on (counted from the start of the file)."""

    name: str
    file: Path
    offset: int


class Options(Protocol):
    """How one format stores one weight: a frozen dataclass that the format defines (empty for most formats)."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One logical matrix (or vector), stored as one tensor or several.

    module   the module that it is a parameter of; empty for a parameter of the model itself
    local    its name in the module, such as ``weight``
    format   name of the format that it is stored in
    shape    shape of the values: (O, I) for a linear layer, (I, O) for a dense Conv1D
    parts    local name → the tensors that store it
    options  how the format stores it
    """

    module: str
    local: str
    format: str
    shape: tuple[int, ...]
    parts: Mapping[str, TensorInfo]
    options: Options

    @property
    def name(self) -> str:
        """Full name: ``model.layers.0.self_attn.q_proj.weight``."""
        return self.prefix + self.local

    @property
    def prefix(self) -> str:
        """What precedes a local name in the full name of a tensor."""
        return f"{self.module}." if self.module else ""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors on disk."""
        return sum(part.nbytes for part in self.parts.values())

    @property
    def numel(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def has_own_parts(self) -> bool:
        """False for an output embedding that is read from the input embedding, because the base ties them."""
        return all(info.name == self.prefix + local for local, info in self.parts.items())


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop`` of a matrix: weights that are larger than the memory budget are worked on in such
    blocks."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Update(ABC):
    """The change of one weight by an adapter, or by several: arithmetic in float32, without files and names.

    A subclass defines ``rank``, ``shape``, ``apply`` and ``to``; it overrides the rest where the default is wrong for
    it.
    """

    @property
    @abstractmethod
    def rank(self) -> int:
        """Rank of the delta, for reports; 1 where it has none."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, I) of the weight that it belongs to; −1 where any number will do."""

    @abstractmethod
    def apply(self, base_OI: Tensor, rows: Rows) -> Tensor:
        """float32 [rows, I] of the base → float32 [rows, I] merged; the input is not changed."""

    @abstractmethod
    def to(self, device: torch.device) -> Update:
        """The same update on another device."""

    @property
    def scale(self) -> float:
        """Factor of the delta (alpha / r for LoRA), for reports; 1 where it has none."""
        return 1.0

    @property
    def whole(self) -> bool:
        """Whether ``apply`` needs all rows of the weight at once, because a row of the result depends on other rows."""
        return False

    @property
    def optional(self) -> bool:
        """Whether the base may lack the weight: the update is then left out, and nothing is lost."""
        return False

    @property
    def needs_dense(self) -> str:
        """Why it can be merged onto 16- or 32-bit values only; empty where it can be merged onto any."""
        return ""

    @property
    def depends_on_base(self) -> bool:
        """Whether the delta may depend on the base's values. False: ``apply`` adds the same delta to any base."""
        return True

    @property
    def members(self) -> tuple[Update, ...]:
        """The updates of single adapters that this one is made of: itself, unless several adapters change the
        weight."""
        return (self,)

    def fitted(self, shape: tuple[int, int]) -> Update:
        """The update for a weight of this shape, where the adapter's tensors alone do not decide it."""
        return self

    def row_norms(self) -> Tensor | None:
        """float32 [O]: ‖delta‖ of every row; None where the delta is not known without the base."""
        return None

    def directions(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """float32 u [O, R], s [R], v [I, R] of the delta's singular value decomposition; None where no small factors
        give it."""
        return None


@dataclass(frozen=True)
class Replacement:
    """Values that the adapter trained as a whole (``modules_to_save``, biases), float32: they replace the base's."""

    values: Tensor


Change: TypeAlias = Update | Replacement
"""The change of one weight by an adapter."""


Action = Literal["copy", "convert", "merge", "replace"]
"""What happens to a weight.

``copy``     its bytes are copied
``convert``  it is written in another format, without a delta
``merge``    the adapter's update is applied to it
``replace``  the adapter brings other values for it
"""


@dataclass(frozen=True)
class TrainingFormat:
    """How training quantized a dense base on the fly (``load_in_4bit=True``)."""

    format: str
    options: Options


@dataclass(frozen=True, kw_only=True)
class StepSource:
    """Where a step takes its values and its grid from.

    weight                the weight that is read; the original's where its values go onto a fresh grid
    conv1d                its dense values are stored as [I, O] (GPT-2's Conv1D); all work is done as [O, I]
    transposed_stack      its dense values are a stack [E, I, O] (gpt-oss' experts); all work is done as [E·O, I]
    keeps_grid            the output keeps the scales that ``weight`` has
    training_format       ``weight`` is first quantized this way, as in training
    original_weight       the 16-bit weight of which ``weight`` is the quantized form, where it is needed too
    merges_onto_original  the delta is added to the 16-bit values; ``weight`` then gives the grid only
    """

    weight: Weight
    conv1d: bool = False
    transposed_stack: bool = False
    keeps_grid: bool = False
    training_format: TrainingFormat | None = None
    original_weight: Weight | None = None
    merges_onto_original: bool = False

    @property
    def base_weight(self) -> Weight:
        """The weight whose values the delta is added to."""
        if self.merges_onto_original and self.original_weight is not None:
            return self.original_weight
        return self.weight

    @property
    def base_format(self) -> str:
        """How the base was quantized when the adapter was trained, as far as known; else how it is stored."""
        return self.training_format.format if self.training_format else self.weight.format

    @property
    def simulates_training(self) -> bool:
        """Whether the values that the delta is added to are quantized on the fly first."""
        return self.training_format is not None and not self.merges_onto_original

    @property
    def nbytes(self) -> int:
        """Bytes on disk of the weights that a merge or a conversion reads."""
        if self.base_weight is self.weight:
            return self.weight.nbytes
        return self.weight.nbytes + self.base_weight.nbytes


@dataclass(frozen=True, kw_only=True)
class Step:
    """What happens to one weight.

    target       name of the format that it is written in, with ``options``
    outputs      full tensor name → dtype and shape; the shape (-1,) is a short text whose length is known at the end
    update       what the adapter adds (``merge``)
    replacement  what the adapter puts in place (``replace``)
    rounding     name of the rounding; ``auto`` until the preflight has chosen one
    """

    source: StepSource
    action: Action
    target: str
    options: Options
    outputs: Mapping[str, TensorSpec]
    update: Update | None = None
    replacement: Replacement | None = None
    rounding: str = "nearest"

    @property
    def weight(self) -> Weight:
        """The weight that is read and written."""
        return self.source.weight

    @property
    def name(self) -> str:
        """Full name of the weight, in the base and in the output."""
        return self.weight.name

    @property
    def label(self) -> str:
        """The name in reports: the module, or the full name for other parameters than ``weight``."""
        return self.weight.module if self.weight.local == "weight" else self.name

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of the values while they are worked on; a vector is one row."""
        if self.source.transposed_stack:
            experts, columns, rows = self.weight.shape
            return experts * rows, columns
        rows, columns = as_matrix(self.weight.shape)
        # A quantized Conv1D is stored as [O, I] already.
        if self.source.conv1d and self.source_is_dense:
            return columns, rows
        return rows, columns

    @property
    def source_is_dense(self) -> bool:
        """Whether the weight is stored as one tensor of numbers. A quantized weight has scales as well, or blocks of bytes."""
        return len(self.weight.parts) == 1 and all(part.dtype != "U8" for part in self.weight.parts.values())


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a weight as a matrix: the first axis of a stack or a convolution gives the rows, a vector is
    one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


def dot(a_OI: Tensor, b_OI: Tensor) -> float:
    """⟨a, b⟩, summed in float32 within a row and in float64 across rows, so that it does not depend on the row
    blocks."""
    return float(torch.linalg.vecdot(a_OI, b_OI, dim=-1).double().sum())
