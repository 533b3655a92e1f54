"""What a format is: how to find, read, round to and write the weights that are stored one way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from qmerge.grids import Grid
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Parts, Rows, TensorInfo, TensorSpec, Weight

NOT_QUANTIZED: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class NoOptions:
    """For formats that can be written in one way only."""


@dataclass(frozen=True)
class Layout:
    """Module names: ``quantized`` are stored in the target format; ``dense`` are not, though its loaders would expect them
    to be; ``skipped`` are those that loaders leave dense by themselves (lm_head); ``experts`` are dense too, and not linear
    layers: some loaders expect them in the target format all the same; ``others`` are stored in the target format with
    other options than most."""

    quantized: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ("lm_head",)
    experts: tuple[str, ...] = ()
    others: tuple[tuple[str, Options], ...] = ()


class Stored(ABC):
    """One weight opened for reading by rows. ``grid`` is the grid of the whole weight."""

    grid: Grid

    @abstractmethod
    def codes(self, rows: Rows) -> Tensor:
        """Codes on ``grid``, [rows, I]."""

    @abstractmethod
    def values(self, rows: Rows) -> Tensor:
        """float32 [rows, I], bit-identical to what the format's own library dequantizes to in float32."""


class Format(ABC):
    """One way to store a weight. Attributes are facts about the format, used to choose and to explain.

    quant_method    ``quantization_config["quant_method"]`` of models stored this way; None for dense formats
    read_methods    every ``quant_method`` of models that hold such weights, where it is not that one alone
    dense_dtype     safetensors dtype of a dense format; None for quantized ones
    is_target       whether qmerge writes it
    loaders         who reads it
    claims_last     takes what no other format has claimed
    needs_scales    fresh grids depend on the values (absmax, SCB)
    accepted_options  options of the recipe that it understands
    row_axis        axis of the part with the codes along which the rows of a weight follow one another
    always_written  optional parts that loaders look for: added where the base lacks them
    takes_conv1d    loaders put it in place of GPT-2's Conv1D, too
    lists_dense     its config is written anew and names what is dense, also where the base's own config did
    single_experts  loaders take experts that are single on disk and stacked in memory
    loaded_as       the only dtype that loaders compute in, which config.json must name
    """

    name: str
    quant_method: ClassVar[str | None] = None
    read_methods: ClassVar[tuple[str, ...]] = ()
    dense_dtype: str | None = None
    is_target: bool = True
    loaders: ClassVar[str] = ""
    claims_last: bool = False
    needs_scales: ClassVar[bool] = True
    accepted_options: ClassVar[tuple[str, ...]] = ()
    row_axis: ClassVar[int] = 0
    always_written: ClassVar[tuple[str, ...]] = ()
    takes_conv1d: ClassVar[bool] = False
    loaded_as: ClassVar[str | None] = None
    lists_dense: ClassVar[bool] = False
    single_experts: ClassVar[bool] = False

    @abstractmethod
    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        """The weights among ``tensors`` that are stored this way; ``quantization`` is the config's word on it.

        Raises:
            CheckpointError: a weight carries the format's marks, but a part is missing or disagrees.
        """

    @abstractmethod
    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        """Read the small parts (scales); the codes are read row by row later."""

    @abstractmethod
    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> Options:
        """How to write: what was asked for, else what ``source`` (options of this or a related format) had, else the
        defaults of the format's library. ``dtype`` is the model's own (safetensors spelling).

        Raises:
            RecipeError: the format has no such option, or not with that value.
        """

    @abstractmethod
    def outputs(self, local: str, shape: tuple[int, ...], options: Options) -> dict[str, TensorSpec]:
        """Local names, dtypes and shapes of the parts that will be written; ``codes_part`` names the one with the codes."""

    def codes_part(self, local: str) -> str:
        """Local name of the part that holds the codes of the weight ``local``."""
        return local

    def row_step(self, shape: tuple[int, int], options: Options) -> int:
        """Row ranges must start at a multiple of this."""
        return 1

    def scales(self, values_OI: Tensor, options: Options, inputs_I: Tensor | None = None) -> Tensor:
        """The scales of a fresh grid for some rows; concatenated over all rows they go to ``grid``.

        ``inputs_I``: float32 [I], mean square of every input of the layer, where calibration saw them.
        """
        return torch.empty(0)

    @abstractmethod
    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: Options, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        """A fresh grid for a whole [O, I] weight from its scales."""

    def same_grid(self, one: Options, other: Options) -> bool:
        """Whether weights with these options of this format lie on the same grid."""
        return one == other

    def as_loaded(self, values_OI: Tensor) -> Tensor:
        """What the stock loader makes of dense values before it quantizes them on the fly (a cast, if anything)."""
        return values_OI

    @abstractmethod
    def pack(self, codes_OI: Tensor, options: Options) -> Tensor:
        """Codes of some rows → what is appended to the part that holds the codes (any shape, the part's dtype)."""

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: Options) -> Parts:
        """The other parts (scales, quant state) for a fresh grid."""
        return {}

    def quantization_config(
        self, options: Options, base: Mapping[str, Any], compute_dtype: str, layout: Layout
    ) -> dict[str, Any] | None:
        """``quantization_config`` for config.json as the stock library would have written it; None for dense.

        ``base`` is that of the base, where it is quantized by the same library, else empty.
        """
        return None

    def side_files(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Further JSON files that the format's loaders look for: name → content."""
        return {}

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether a weight of this shape is one that the loaders of this format expect in it."""
        return len(shape) == 2

    def fitted(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """``asked`` with defaults that depend on the model: ``shapes`` [O, I] of all weights that will be stored this way."""
        return asked

    def described(self, options: Options) -> str:
        """The options in a few words, where there is something to say."""
        return ""

    def check(self, name: str, shape: tuple[int, int], options: Options) -> None:  # noqa: B027  (most take any)
        """Raise RecipeError when a matrix of this shape cannot be stored this way."""

    def target_warnings(self, options: Options, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """What fewer loaders will read, of weights written this way: ``shapes`` are their [O, I] by name."""
        return []

    def base_warnings(self, weights: Sequence[Weight], quantization: Mapping[str, Any]) -> list[str]:
        """What is odd about a base that is stored this way, but no error."""
        return []

    def check_range(self, stored_OI: Tensor, merged_OI: Tensor, name: str) -> None:  # noqa: B027  (most have no limit)
        """Raise NumbersError when a finite value became infinite."""


class ReadOnly(Format):
    """A format that is read and never written: what is asked of targets is asked of it by mistake."""

    is_target = False

    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> Options:
        return NoOptions()

    def outputs(self, local: str, shape: tuple[int, ...], options: Options) -> dict[str, TensorSpec]:
        raise AssertionError(f"{self.name} is never a target")

    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: Options, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        raise AssertionError(f"{self.name} is never a target")

    def pack(self, codes_OI: Tensor, options: Options) -> Tensor:
        raise AssertionError(f"{self.name} is never a target")


class OnTheFly(Stored):
    """A dense weight as quantization on the fly leaves it: what an adapter saw that was trained on such a base.

    A fresh grid over all row blocks, rounded to nearest, as the stock loader does.
    """

    def __init__(
        self, dense: Stored, shape: tuple[int, int], form: Format, options: Options, blocks: Iterable[Rows]
    ) -> None:
        self._dense, self._form = dense, form
        scales = [form.scales(self._loaded(rows), options) for rows in blocks]
        self._fresh = form.grid(torch.cat(scales), shape, options)
        self.grid = self._fresh.as_stored()

    def codes(self, rows: Rows) -> Tensor:
        return self._fresh.rows(rows).nearest(self._loaded(rows))

    def values(self, rows: Rows) -> Tensor:
        return self.grid.rows(rows).decode(self.codes(rows))

    def _loaded(self, rows: Rows) -> Tensor:
        return self._form.as_loaded(self._dense.values(rows))


class Transposed(Stored):
    """A dense [I, O] weight (GPT-2's Conv1D) as [O, I]."""

    def __init__(self, dense: Stored, columns: int) -> None:
        self._dense, self._all = dense, Rows(0, columns)
        self.grid = dense.grid

    def codes(self, rows: Rows) -> Tensor:
        return self._dense.codes(self._all).T[rows.start : rows.stop].contiguous()

    def values(self, rows: Rows) -> Tensor:
        return self._dense.values(self._all).T[rows.start : rows.stop].contiguous()
