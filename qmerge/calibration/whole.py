"""A model with all of its weights in memory, as float32: for models that are small, or have no layers that run one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from qmerge.calibration.layered import Values, is_conv1d
from qmerge.checkpoint.architecture import empty_model
from qmerge.checkpoint.conversion import Conversion
from qmerge.errors import CheckpointError


class WholeModel:
    """A model without weights, until ``load``.

    Attributes:
        model: transformers' model.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.model: Any = empty_model(config).eval()
        self._conversion = Conversion(self.model)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights as float32."""
        entries: int = sum(parameter.numel() for parameter in self.model.parameters())
        return 4 * entries

    def is_conv1d(self, name: str) -> bool:
        """Whether this weight on disk belongs to a Conv1D (GPT-2), which a dense checkpoint stores as [I, O]."""
        return is_conv1d(self.model, self._conversion.rename(name).parameter)

    def load(self, names: Sequence[str], values: Values, device: torch.device) -> Any:
        """Load all weights.

        Args:
            names: of the weights on disk.

        Returns:
            The model, ready to run.

        Raises:
            CheckpointError: a parameter has no values.
        """
        self._conversion.load({name: values(name).to(device) for name in names})
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise CheckpointError(f"the checkpoint has no values for {name} of {type(self.model).__name__}")
        model: nn.Module = self.model.to(device)  # the buffers that no file has
        return model
