"""How a weight is written: in which format, with which options, and whether on the grid that it has already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qmerge.formats import get_format, get_target
from qmerge.formats.base import TargetFormat
from qmerge.gguf.output import GgufOutput
from qmerge.planning.inputs import Inputs
from qmerge.planning.modules import Modules
from qmerge.recipe import Recipe
from qmerge.types import DENSE_FORMATS, Options, TrainingFormat, Weight


@dataclass(frozen=True, kw_only=True)
class WeightTarget:
    """How one weight is written.

    training_format  how training quantized the weight on the fly, where that is repeated
    keeps_grid       the grid stays the same, with its scales
    """

    format: TargetFormat[Any]
    options: Options
    training_format: TrainingFormat | None
    keeps_grid: bool


@dataclass(frozen=True)
class TargetChooser:
    """Chooses a target for every weight of the base.

    promoted: names of weights that stay dense although the target is quantized.
    gguf: the GGUF file, where the target is one.
    """

    recipe: Recipe
    inputs: Inputs
    modules: Modules
    promoted: frozenset[str]
    gguf: GgufOutput | None = None

    @property
    def format(self) -> TargetFormat[Any]:
        """The format that the recipe names."""
        return get_target(self.recipe.target)

    def choose(self, weight: Weight, merged: bool) -> WeightTarget:
        """The target of one weight.

        Args:
            merged: an update is applied to the weight.
        """
        fmt = self.format_of(weight, merged)
        training = self._training_format(weight)
        options = self._options(weight, fmt, training)
        return WeightTarget(
            format=fmt,
            options=options,
            training_format=training,
            keeps_grid=self._keeps_grid(weight, fmt, options, training),
        )

    def format_of(self, weight: Weight, merged: bool) -> TargetFormat[Any]:
        """The format that a weight is written in.

        A quantized target takes the weights that its stock loader quantizes. A dense target takes all quantized weights
        and all weights in the base's own dtype; a weight that the base stores wider or narrower on purpose keeps its
        dtype.

        Raises:
            RecipeError: the weight has a dtype that is only copied.
        """
        stored = get_format(weight.format).info
        if self.gguf is not None:
            return self.format
        if weight.name in self.promoted:
            return self._dense_format  # --promote: rounding it would lose most
        if self.format.info.is_quantized:
            if self.modules.is_quantizable(weight):
                return self.format
            return self._dense_format if stored.is_quantized else get_target(weight.format)
        if stored.is_quantized or merged or stored.dense_dtype == self.inputs.base.stored_dtype:
            return self.format
        return get_target(weight.format)

    def format_of_replacement(self, weight: Weight) -> TargetFormat[Any]:
        """The format that the adapter's own values are written in.

        Raises:
            RecipeError: the weight has a dtype that is only copied.
        """
        fmt = self.format_of(weight, merged=True)
        if self.gguf is not None or not fmt.info.is_quantized:
            return fmt
        # An embedding with another number of tokens, in a format that quantizes embeddings (MLX): its rows were never rounded,
        # and the loader takes a dense embedding, too.
        stored = get_format(weight.format).info
        return self._dense_format if stored.is_quantized else get_target(weight.format)

    @property
    def _dense_format(self) -> TargetFormat[Any]:
        # In the dtype of the model: transformers does not cast the tensors of a quantized checkpoint.
        return get_target(DENSE_FORMATS[self.inputs.base.dtype])

    def _training_format(self, weight: Weight) -> TrainingFormat | None:
        if self.recipe.trained_on_format is None or not self.modules.is_quantizable(weight):
            return None
        if self.modules.is_quantizable_embedding(weight) or len(weight.shape) > 2:
            return None  # no training on the fly quantizes it
        name, asked = self.recipe.trained_on_format
        # Merging onto the original uses training's grid only, and that only where the output is stored on it.
        if self.recipe.merge_onto == "original" and name != self.format.name:
            return None
        return TrainingFormat(name, get_target(name).options(asked, None, self.inputs.base.dtype))

    def _options(self, weight: Weight, fmt: TargetFormat[Any], training: TrainingFormat | None) -> Options:
        if self.gguf is not None:
            return self.gguf.options_of(weight)
        if fmt.name == weight.format and fmt.info.is_dense:
            return weight.options
        default = training.options if training else weight.options
        options: Options = fmt.options(self._asked_options, default, self.inputs.base.dtype)
        return options

    @cached_property
    def _asked_options(self) -> Mapping[str, Any]:
        """The recipe's options for the target; where the base is stored otherwise, with defaults that suit the
        model."""
        if not self.format.info.is_quantized or self.format.name in self.inputs.base.formats():
            return self.recipe.format_options
        shapes: list[tuple[int, ...]] = []
        for weight in self.inputs.base.weights.values():
            if not self.modules.is_quantizable(weight):
                continue
            shape = weight.shape
            if self.modules.is_dense_conv1d(weight):
                shape = shape[::-1]
            shapes.append(shape)
        return self.format.options_for_model(self.recipe.format_options, shapes)

    def _keeps_grid(
        self, weight: Weight, fmt: TargetFormat[Any], options: Options, training: TrainingFormat | None
    ) -> bool:
        if not fmt.info.is_quantized or self.recipe.scales != "keep":
            return False
        if training is not None:
            return training.format == fmt.name and fmt.same_grid(training.options, options)
        return fmt.keeps_grid_of(weight, options)
