"""Adapter keys ↔ weights on disk, where transformers renames, stacks, joins, splits or transposes weights as it loads them.

transformers has a list of conversions per architecture (``conversion_mapping.py``) and code that runs them on tensors
(``core_model_loading.py``). That code itself is run here, on tensors that hold no values but remember where each of
their values lies on disk. Nothing is allocated, whatever the model's size; what is no pure rearrangement is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cached_property
from typing import Any

from torch import Tensor

from qmerge.checkpoint.scan import Checkpoint
from qmerge.checkpoint.skeleton import meta_model
from qmerge.checkpoint.traced import Place, Shape, Traced, _place, traced, whole
from qmerge.errors import CheckpointError, listed

UNCONVERTED = frozenset(
    {"gemma", "gemma2", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2"}
)
"""``model_type`` of text models for which transformers has no conversion (a test asks it): a module that is on disk under
its name is that weight, and nothing needs to be imported or built to know it."""


class Names:
    """
    Args:
        config: config.json of the base.
        disk: name → shape of every weight on disk (of the values: [O, I] for a packed matrix).

    Nothing is imported or built before a key needs it.
    """

    def __init__(self, config: Mapping[str, Any], disk: Mapping[str, Sequence[int]]) -> None:
        self._config = config
        self.disk: dict[str, Shape] = {name: tuple(shape) for name, shape in disk.items()}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Names:
        return cls(checkpoint.config, {name: weight.shape for name, weight in checkpoint.weights.items()})

    def module_of(self, name: str) -> str | None:
        """The (first) parameter in memory that a weight on disk becomes, or becomes part of; None: it is not loaded.

        Where transformers does not know the architecture, names in memory are taken to be those on disk.
        """
        if self._loading is None:
            return name if name in self.disk else None
        return self._loading.parameter_of.get(name)

    def disk_of(self, key: str) -> tuple[Place, ...] | None:
        """Where the weight lies that an adapter names, by module or by parameter, in the old or the new spelling, with or
        without the base model's prefix (``base_model.model.`` and ``.lora_A.weight`` are taken off already).

        Returns:
            Blocks that cover it exactly once. None: there is no such weight on disk, or more than one.

        Raises:
            CheckpointError: transformers makes the weight by what is no pure rearrangement, or the parts on disk do
                not make up its parameter.
        """
        spellings = [name for name in (f"{key}.weight", key) if name]
        if self._config.get("model_type") in UNCONVERTED or self._loading is None:
            here = [name for name in spellings if name in self.disk]
            if len(here) == 1 or self._loading is None:
                return (whole(here[0], here[0], self.disk[here[0]]),) if len(here) == 1 else None
        found = [places for name in spellings if (places := self._loading.places(name)) is not None]
        return found[0] if len(found) == 1 else None

    def targeted(self, key: str, target_parameters: Iterable[str]) -> str:
        """The parameter that a key of a peft adapter with ``target_parameters`` belongs to; any other key as it is.

        peft wraps the targeted parameters of a module in the order of their declaration, each wrapper around the one
        before: with two of them, ``experts.base_layer`` is the first and ``experts`` the second
        (peft/tuners/tuners_utils.py, _inject_parameters).
        """
        module, depth = key, 0
        while module.endswith(".base_layer"):
            module, depth = module.removesuffix(".base_layer"), depth + 1
        chosen = self.targeted_in(module, target_parameters)
        return chosen[-1 - depth] if depth < len(chosen) else key

    def targeted_in(self, module: str, target_parameters: Iterable[str]) -> list[str]:
        """The targeted parameters that a module itself declares, in that order."""
        wanted = tuple(target_parameters)
        owned = self._loading.parameters_in(module) if self._loading and wanted else []
        return [name for name in owned if any(f".{name}".endswith(f".{target}") for target in wanted)]

    def is_transposed(self, parameter: str) -> bool:
        """Whether transformers says that a stack of experts is [E, I, O] (gpt-oss)."""
        return self._loading is not None and self._loading.is_transposed(parameter)

    @cached_property
    def _loading(self) -> _Loading | None:
        try:
            model = meta_model(self._config)
        except CheckpointError:
            return None
        return _Loading(model, self.disk)


class _Loading:
    """What transformers does with the names and tensors of one checkpoint."""

    def __init__(self, model: Any, disk: Mapping[str, Shape]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

        mapping = get_model_conversion_mapping(model)
        self._model, self._disk = model, disk
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._meta: dict[str, Tensor] = model.state_dict()
        self._traced: dict[str, Traced] = {}
        self._taken_apart: dict[str, dict[str, Traced]] = {}
        self.parameter_of: dict[str, str] = {}
        self._sources: dict[str, list[tuple[str, str | None]]] = {}
        self._first_target: dict[str, str] = {}
        self._spelled: dict[str, list[str]] = {}
        for name in sorted(disk, key=dot_natural_key):
            self._add(name)

    def _add(self, name: str) -> None:
        """As convert_and_load_state_dict_in_model (transformers/core_model_loading.py) collects tensors."""
        parameter, pattern = self._renamed(name)
        if parameter not in self._meta:
            return
        self.parameter_of[name] = parameter
        self._sources.setdefault(parameter, []).append((name, pattern))
        for target in self._targets(parameter, pattern):
            self._first_target.setdefault(target, parameter)
        if pattern is not None:
            self._spelled.setdefault(self._spelling(name), []).append(name)

    def _renamed(self, name: str) -> tuple[str, str | None]:
        """(name in memory, pattern of the converter that the weight goes through)."""
        from transformers.core_model_loading import rename_source_key

        prefix, meta = self._model.base_model_prefix, self._meta
        renamed, pattern = rename_source_key(name, self._renamings, self._converters, prefix, meta)
        if renamed not in meta and name in meta:
            renamed, pattern = rename_source_key(name, [], [], prefix, meta)
        return renamed, pattern

    def _targets(self, parameter: str, pattern: str | None) -> list[str]:
        """All parameters that are made together with the first one."""
        if pattern is None:
            return [parameter]
        first, *others = self._by_pattern[pattern].target_patterns
        return [parameter, *(parameter.replace(first, other) for other in others)]

    def _spelling(self, name: str) -> str:
        """What converters see of a name, without the base model's prefix: the same for every old and new spelling."""
        from transformers.core_model_loading import rename_source_key

        return self._unprefixed(rename_source_key(name, self._renamings, [])[0])

    def _unprefixed(self, name: str) -> str:
        prefix = self._model.base_model_prefix
        return name.removeprefix(f"{prefix}.") if prefix else name

    def parameters_in(self, module: str) -> list[str]:
        """Parameters that a module itself declares, in that order; the module in any spelling."""
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        for spelled in (module, rename_source_key(module, self._renamings, [])[0]):
            for name in (spelled, f"{prefix}.{spelled}", self._unprefixed(spelled)):
                try:
                    declared = self._model.get_submodule(name).named_parameters(recurse=False)
                except AttributeError:
                    continue
                return [f"{name}.{local}" for local, _ in declared]
        return []

    def is_transposed(self, parameter: str) -> bool:
        return bool(getattr(self._model.get_submodule(parameter.rpartition(".")[0]), "is_transposed", False))

    def places(self, name: str) -> tuple[Place, ...] | None:
        """Where a weight lies, by its full name in any spelling."""
        if name in self._meta:
            elsewhere = name in self._disk and name not in (source for source, _ in self._made_of(name))
            return None if elsewhere else self._of_parameter(name)
        parameter, pattern = self._renamed(name)
        if parameter not in self._meta:
            return None
        if pattern is None:
            return self._of_parameter(parameter)
        return self._of_part(name, parameter, pattern)

    def _made_of(self, parameter: str) -> list[tuple[str, str | None]]:
        return self._sources.get(self._first_target.get(parameter, parameter), [])

    def _of_parameter(self, parameter: str) -> tuple[Place, ...] | None:
        sources = self._made_of(parameter)
        if not sources or (sources[0][1] is None and len(sources) > 1):
            return None
        return self._decoded(parameter, self._trace(parameter))

    def _of_part(self, name: str, parameter: str, pattern: str) -> tuple[Place, ...] | None:
        """A name that only converters know: one expert's ``w1``. On disk it is there as such, or in what it is part of."""
        alike = self._spelled.get(self._spelling(name), [])
        if alike:
            return (whole(alike[0], parameter, self._disk[alike[0]]),) if len(alike) == 1 else None
        targets = self._targets(parameter, pattern)
        if not all(self._made_of(target) for target in targets):
            return None
        if parameter not in self._taken_apart:
            self._taken_apart[parameter] = self._parts(targets, pattern)
        found = self._taken_apart[parameter].get(self._spelling(name))
        return None if found is None else self._decoded(parameter, found)

    def _parts(self, targets: list[str], pattern: str) -> dict[str, Traced]:
        """The parameters taken apart again, as transformers does when it saves: spelling → part."""
        traced = {target: self._trace(target) for target in targets}
        with _conversion(targets[0], list(traced), self._by_pattern[pattern]):
            backward = self._by_pattern[pattern].reverse_transform()
            renamed = {target: backward.rename_source_key(target) for target in targets}
            for target, (key, source) in renamed.items():
                backward.add_tensor(key, target, source, traced[target])
            made = backward.convert(renamed[targets[0]][0], model=self._model, config=self._model.config)
        return {self._unprefixed(name): _one(part) for name, part in made.items()}

    def _trace(self, parameter: str) -> Traced:
        """A parameter made by transformers' own conversion of tensors that know where they lie."""
        if parameter not in self._traced:
            first = self._first_target.get(parameter, parameter)
            sources = self._sources[first]
            name, pattern = sources[0]
            if pattern is None:
                self._traced[parameter] = traced(name, self._disk[name])
            else:
                self._traced.update(self._converted(first, sources, deepcopy(self._by_pattern[pattern])))
        if parameter not in self._traced:
            raise CheckpointError(f"transformers does not make {parameter} of {listed([name for name, _ in sources])}")
        return self._traced[parameter]

    def _converted(
        self, parameter: str, sources: list[tuple[str, str | None]], converter: Any
    ) -> dict[str, Traced]:  # fmt: skip
        names = [name for name, _ in sources]
        with _conversion(parameter, names, converter):
            for name, pattern in sources:
                converter.add_tensor(parameter, name, pattern, traced(name, self._disk[name]))
            made = converter.convert(parameter, model=self._model, config=self._model.config)
        found = {name: _one(tensor) for name, tensor in made.items()}
        for name, tensor in found.items():
            if name in self._meta and tensor.shape != self._meta[name].shape:
                raise CheckpointError(
                    f"{name} is {list(self._meta[name].shape)}, but {listed(names)} on disk make up "
                    f"{list(tensor.shape)}. Download the model again"
                )
        return found

    def _decoded(self, parameter: str, tensor: Traced) -> tuple[Place, ...]:
        shape = tuple(tensor.shape)
        return tuple(_place(parameter, shape, piece, self._disk[piece.weight]) for piece in tensor.pieces)


@contextmanager
def _conversion(parameter: str, sources: list[str], converter: Any) -> Iterator[None]:
    """Errors inside say which weight transformers makes of what, and how."""
    try:
        yield
    except Exception as cause:
        steps = ", ".join(type(operation).__name__ for operation in converter.operations)
        raise CheckpointError(
            f"{parameter}, which transformers makes of {listed(sources)} by {steps}, cannot be traced to the disk: {cause}"
        ) from cause


def _one(tensor: Any) -> Traced:
    first = tensor[0] if isinstance(tensor, list) else tensor
    assert isinstance(first, Traced)
    return first
