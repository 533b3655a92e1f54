"""The base class of formats that qmerge writes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from qmerge.formats.base.format import Format, OptionsT
from qmerge.grids import Grid
from qmerge.types import Options, Parts, TensorSpec, Weight


@dataclass(frozen=True)
class ModuleLayout:
    """Names of the modules of a model, by how they are stored."""

    quantized: tuple[str, ...] = ()
    """Stored in the target format."""

    dense: tuple[str, ...] = ()
    """Stored dense, although loaders would expect the target format."""

    skipped: tuple[str, ...] = ("lm_head",)
    """Modules that loaders leave dense by default."""

    experts: tuple[str, ...] = ()
    """Stored dense and not linear layers; some loaders expect them in the target format anyway."""

    others: tuple[tuple[str, Options], ...] = ()
    """Stored in the target format, with other options than most modules."""


def with_asked(options: OptionsT, asked: Mapping[str, Any]) -> OptionsT:
    """The options, changed to those of the recipe; None in ``asked`` means not asked for."""
    changes = {name: value for name, value in asked.items() if value is not None}
    changed: OptionsT = replace(cast(Any, options), **changes)  # options are dataclasses, which a Protocol cannot say
    return changed


class TargetFormat(Format[OptionsT]):
    """A format that qmerge writes as well as reads: written weights are read back to measure them.

    Shapes are those of the weight, [O, I]. ``local`` is the name of the weight in its module, usually ``weight``.
    """

    @abstractmethod
    def options(self, asked: Mapping[str, Any], source: Options | None, dtype: str) -> OptionsT:
        """How to write a weight: as asked for, otherwise as the base has it, otherwise as the format's library does.

        Args:
            asked: options of the recipe, by name; None means not asked for.
            source: options of the weight in the base, which may belong to another format.
            dtype: the model's own dtype, in the spelling of safetensors.

        Raises:
            RecipeError: the format has no such option, or not with that value.
        """

    @abstractmethod
    def outputs(self, local: str, shape: tuple[int, ...], options: OptionsT) -> dict[str, TensorSpec]:
        """Local name → dtype and shape of every tensor that will be written, including ``codes_part``.

        Raises:
            RecipeError: a weight of this shape cannot be stored with these options.
        """

    def scales(self, values_OI: Tensor, options: OptionsT, inputs_I: Tensor | None = None) -> Tensor:
        """Scales of a fresh grid for some rows; those of all rows are concatenated along the first axis for ``grid``.

        Args:
            values_OI: float32, the merged values of the rows.
            inputs_I: float32, mean square of every input of the layer; None without calibration.
        """
        return torch.empty(0)

    @abstractmethod
    def grid(
        self, scales: Tensor, shape: tuple[int, int], options: OptionsT, inputs_I: Tensor | None = None
    ) -> Grid:  # fmt: skip
        """A fresh grid for a whole weight, from the concatenated ``scales``."""

    def sample_grid(self, values_OI: Tensor, options: OptionsT) -> Grid:
        """A fresh grid for predictions, for some rows as if they were the whole weight. Small differences do not matter."""
        rows, columns = values_OI.shape
        return self.grid(self.scales(values_OI, options), (rows, columns), options)

    def same_grid(self, one: OptionsT, other: OptionsT) -> bool:
        """Whether weights with these options have the same grid, so that the base's scales can be kept."""
        return one == other

    def keeps_grid_of(self, weight: Weight, options: OptionsT) -> bool:
        """Whether a weight of the base is on a grid that these options can keep."""
        return weight.format == self.name and self.same_grid(self.options_of(weight), options)

    def stores(self, weight: Weight, options: OptionsT) -> bool:
        """Whether a weight of the base is on disk just as these options would store it."""
        return weight.format == self.name and weight.options == options

    def as_loaded(self, values_OI: Tensor) -> Tensor:
        """Dense values as the stock loader casts them before it quantizes them on the fly."""
        return values_OI

    @abstractmethod
    def pack(self, codes_OI: Tensor, grid: Grid, options: OptionsT) -> Tensor:
        """Codes of some rows in the dtype of ``codes_part``, in any shape, ready to be appended to it.

        Args:
            grid: that of the same rows, for formats that store scales between the codes.
        """

    def scale_tensors(self, grid: Grid, local: str, shape: tuple[int, ...], options: OptionsT) -> Parts:
        """The other tensors (scales, zeros, quant state) of a weight on ``grid``, which is one of this format."""
        return {}

    def quantization_config(
        self, options: OptionsT, base: Mapping[str, Any], compute_dtype: str, layout: ModuleLayout
    ) -> dict[str, Any] | None:
        """``quantization_config`` for config.json as the format's library would have written it; None for dense formats.

        Args:
            options: those of most weights.
            base: ``quantization_config`` of the base if the same library wrote it, otherwise empty.
            compute_dtype: dtype of the model, in torch's spelling.
        """
        return None

    def complete_config(self, config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
        """config.json as the format's loaders expect it.

        Args:
            config: of the model, without any quantization.
            quantization: ``quantization_config`` of the output.
        """
        return {**config, "quantization_config": quantization}

    def side_files(self, quantization: Mapping[str, Any]) -> dict[str, Any]:
        """Name → content of further JSON files that the format's loaders read."""
        return {}

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether the loaders of this format expect a weight of this shape in it."""
        return len(shape) == 2

    def options_for_model(self, asked: Mapping[str, Any], shapes: Sequence[tuple[int, ...]]) -> Mapping[str, Any]:
        """``asked``, with defaults that depend on the model: ``shapes`` are those of all weights to be stored this way."""
        return asked

    def describe_options(self, options: OptionsT) -> str:
        """The options in a few words, for reports; empty if every weight is stored in the same way."""
        return ""

    def uses_input_order(self, options: OptionsT) -> bool:
        """Whether a fresh grid with these options depends on which inputs of the layer are the largest."""
        return False

    def check(self, name: str, shape: tuple[int, int], options: OptionsT) -> None:
        """Check that a weight can be stored on a fresh grid.

        Raises:
            RecipeError: it cannot, because of its shape or the options.
        """

    def target_warnings(self, options: OptionsT, shapes: Mapping[str, tuple[int, int]]) -> list[str]:
        """Warnings about loaders that cannot read weights written with these options: ``shapes`` are theirs, by name."""
        return []

    def check_range(self, stored_OI: Tensor, merged_OI: Tensor, name: str) -> None:
        """Check that rounding kept finite values finite.

        Raises:
            NumbersError: a value is beyond the largest number of the format.
        """
