"""The base class of all formats: how to find weights in a checkpoint and how to read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

import torch

from qmerge.formats.base.info import FormatInfo
from qmerge.formats.base.stored import Stored, TransposedStack
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, TensorInfo, Weight

NOT_QUANTIZED: Mapping[str, Any] = MappingProxyType({})
"""``quantization_config`` of a model that has none."""

OptionsT = TypeVar("OptionsT", bound=Options)


@dataclass(frozen=True)
class NoOptions:
    """Options of formats that store every weight in the same way."""


class Format(ABC, Generic[OptionsT]):
    """A way to store a weight, as qmerge reads it. ``OptionsT`` says how one weight is stored in this format."""

    info: FormatInfo

    @property
    def name(self) -> str:
        """Name in recipes, flags and reports."""
        return self.info.name

    @abstractmethod
    def find(
        self, tensors: Mapping[str, TensorInfo], reader: Reader, quantization: Mapping[str, Any] = NOT_QUANTIZED
    ) -> list[Weight]:
        """The weights among ``tensors`` that are stored in this format.

        Args:
            quantization: ``quantization_config`` of the model's config.json.

        Raises:
            CheckpointError: a weight looks like this format, but a tensor of it is missing, or two contradict each other.
        """

    @abstractmethod
    def open(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        """Read the scales of a weight of this format; its codes are read later, some rows at a time.

        Raises:
            CheckpointError: a scale is NaN or infinite.
        """

    def open_matrices(self, weight: Weight, reader: Reader, device: torch.device) -> Stored:
        """Open a stack [E, I, O] as a matrix [E·O, I]: matrix after matrix, each transposed.

        Raises:
            CheckpointError: as ``open``.
        """
        return TransposedStack(self.open(weight, reader, device), weight.shape)

    def options_of(self, weight: Weight) -> OptionsT:
        """How a weight of this format is stored."""
        return cast(OptionsT, weight.options)  # ``find`` of this format made them

    def codes_part(self, local: str) -> str:
        """Local name of the tensor with the codes of the weight that is called ``local`` in its module."""
        return local

    def row_step(self, shape: tuple[int, int], options: OptionsT) -> int:
        """Row ranges must start at a multiple of this, in a weight of shape [O, I]."""
        return 1

    def base_warnings(self, weights: Sequence[Weight], quantization: Mapping[str, Any]) -> list[str]:
        """Warnings about a base with these weights of this format and this ``quantization_config``."""
        return []
