"""transformers' own conversion between the tensors of a checkpoint and the parameters of a model.

transformers renames, stacks, joins, splits or transposes weights as it loads them. It has a list of conversions per
architecture (``conversion_mapping.py``) and code that runs them on tensors (``core_model_loading.py``). Nothing of that is
repeated in qmerge: ``Conversion`` calls it, on real tensors to load a model, or on tensors without values to find out which
part of a file a parameter comes from (``traced.py``).

The list has two kinds of entries. A renaming changes a name only. A converter collects all tensors whose names match its
source patterns (``experts.*.w1.weight``, ``experts.*.w3.weight``), runs operations on them (stack, concatenate) and gives
the results names by its target patterns (``experts.gate_up_proj``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmerge.checkpoint.architecture import embedding_weights_of


class Renamed(NamedTuple):
    """The parameter that a weight becomes, or becomes a part of (the first one, where a converter makes several)."""

    parameter: str
    pattern: str | None
    """Source pattern of the converter that the weight goes through; None where it is only renamed."""


class Source(NamedTuple):
    """A weight that a converter collects: its name, the source pattern that it matches, its values."""

    name: str
    pattern: str | None
    tensor: Tensor


class Conversion:
    """The conversions of one model.

    Args:
        model: a transformers model; it may be on the meta device.

    Attributes:
        parameters: name → tensor of everything in the model's state dict.
        shared: parameter → the one whose values it has, apart from the output embedding (Zamba's blocks that several layers
            share).
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        self._prefix = model.base_model_prefix
        self.parameters: dict[str, Tensor] = model.state_dict()
        self.shared = _shared_parameters(model)
        self._entries = get_model_conversion_mapping(model)
        self._renamings: list[Any] = []
        self._converters: list[Any] = []
        self._by_pattern: dict[str, Any] = {}
        for entry in self._entries:
            if isinstance(entry, WeightRenaming):
                self._renamings.append(entry)
            if isinstance(entry, WeightConverter):
                self._converters.append(entry)
                self._by_pattern.update(dict.fromkeys(entry.source_patterns, entry))

    # --- names ---

    def rename(self, name: str) -> Renamed:
        """The name in memory of a weight on disk, by the rule of ``convert_and_load_state_dict_in_model``.

        The result need not be a parameter of the model: files may hold more than the model loads.
        """
        from transformers.core_model_loading import rename_source_key

        renamed = Renamed(
            *rename_source_key(
                name,
                self._renamings,
                self._converters,
                base_model_prefix=self._prefix,
                meta_state_dict=self.parameters,
            )
        )
        if renamed.parameter not in self.parameters and name in self.parameters:
            # Files saved in the new layout have the names of memory, which an old renaming may match by accident.
            return Renamed(
                *rename_source_key(name, [], [], base_model_prefix=self._prefix, meta_state_dict=self.parameters)
            )
        return renamed

    def canonical_name(self, name: str) -> str:
        """The name before any converter, without the base model's prefix: equal for every old and new spelling."""
        return self._without_prefix(self._only_renamed(name))

    def targets(self, renamed: Renamed) -> list[str]:
        """The parameter of a renamed weight, and all others that the same converter makes at the same time."""
        if renamed.pattern is None:
            return [renamed.parameter]
        first, *others = self._by_pattern[renamed.pattern].target_patterns
        return [renamed.parameter, *(renamed.parameter.replace(first, other) for other in others)]

    def parameters_in(self, module: str) -> list[str]:
        """Full names of the parameters that a module itself declares, in that order; [] where there is no such module.

        The module may be spelled as on disk or as in memory, with or without the base model's prefix.
        """
        for spelling in (module, self._only_renamed(module)):
            for name in (spelling, f"{self._prefix}.{spelling}", self._without_prefix(spelling)):
                try:
                    declared = self._model.get_submodule(name).named_parameters(recurse=False)
                except AttributeError:
                    continue
                return [f"{name}.{local}" for local, _ in declared]
        return []

    def is_transposed(self, parameter: str) -> bool:
        """Whether transformers marks the module of a stack of experts as [E, I, O] (gpt-oss)."""
        module = self._model.get_submodule(parameter.rpartition(".")[0])
        return bool(getattr(module, "is_transposed", False))

    def operations(self, pattern: str) -> str:
        """Names of the operations of a converter, for messages: ``MergeModulelist, Concatenate``."""
        return ", ".join(type(operation).__name__ for operation in self._by_pattern[pattern].operations)

    def _only_renamed(self, name: str) -> str:
        from transformers.core_model_loading import rename_source_key

        return str(rename_source_key(name, self._renamings, [])[0])

    def _without_prefix(self, name: str) -> str:
        return name.removeprefix(f"{self._prefix}.") if self._prefix else name

    # --- tensors ---

    def join(self, parameter: str, sources: Sequence[Source]) -> dict[str, Tensor]:
        """Run one converter forward, as loading does: weights on disk → parameters by name.

        Args:
            parameter: the first parameter that the converter makes.
            sources: all weights that it collects, in the order in which transformers sorts them.

        Raises:
            Exception: whatever an operation raises.
        """
        pattern = sources[0].pattern
        assert pattern is not None, "only converters make parameters of several weights"
        converter = deepcopy(self._by_pattern[pattern])  # it keeps the tensors that it collects
        for source in sources:
            converter.add_tensor(parameter, source.name, source.pattern, source.tensor)
        joined = converter.convert(parameter, model=self._model, config=self._model.config)
        return {name: _unwrapped(tensor) for name, tensor in joined.items()}

    def split(self, parameters: Mapping[str, Tensor], pattern: str) -> dict[str, Tensor]:
        """Run one converter backward, as saving does: parameters → weights on disk by canonical name.

        Args:
            parameters: everything that the converter makes, by name, the first one first.
            pattern: one of its source patterns.

        Raises:
            Exception: whatever an operation raises.
        """
        backward = self._by_pattern[pattern].reverse_transform()
        first_key, _ = backward.rename_source_key(next(iter(parameters)))
        for parameter, tensor in parameters.items():
            key, source_pattern = backward.rename_source_key(parameter)
            backward.add_tensor(key, parameter, source_pattern, tensor)
        weights = backward.convert(first_key, model=self._model, config=self._model.config)
        return {self._without_prefix(name): _unwrapped(tensor) for name, tensor in weights.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load weights by their names on disk into the model, as float32 on the device where they are, and tie weights."""
        from transformers import logging
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        logging.disable_progress_bar()  # one bar per decoder layer otherwise
        devices = {tensor.device for tensor in tensors.values()}
        device = next(iter(devices), torch.device("cpu"))
        load_config = LoadStateDictConfig(weight_mapping=self._entries, dtype=torch.float32, device_map={"": device})
        convert_and_load_state_dict_in_model(self._model, tensors, load_config)
        self._model.tie_weights()


def _shared_parameters(model: Any) -> dict[str, str]:
    """Parameter → the one that transformers ties it to. The output embedding, whose tie may be given up, is left out."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    _, output_embedding = embedding_weights_of(model) or (None, None)
    return {name: source for name, source in tied.items() if name != output_embedding}


def _unwrapped(result: Any) -> Tensor:
    """Converters wrap some of their results in a list of one."""
    tensor: Tensor = result[0] if isinstance(result, list) else result
    return tensor
