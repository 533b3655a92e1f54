"""Names in adapters ↔ weights on disk, where transformers renames, stacks, joins, splits or transposes weights.

An adapter names modules and parameters as they are in memory, in the spelling of the library version that it was trained
with. ``Names`` finds the weights on disk that they are made of, by following transformers' own conversion (``conversion.py``)
with tensors that know where their values are on disk (``traced.py``). Nothing is allocated, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

from torch import Tensor

from qmerge.checkpoint.architecture import meta_model
from qmerge.checkpoint.blocks import DiskBlock, disk_block, whole_weight
from qmerge.checkpoint.conversion import Conversion, Renamed, Source
from qmerge.checkpoint.scan import Checkpoint
from qmerge.checkpoint.traced import Shape, TracedTensor, traced_weight
from qmerge.errors import CheckpointError, listed

UNCONVERTED = frozenset(
    {"gemma", "gemma2", "gpt2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "starcoder2"}
)
"""``model_type`` of text models for which transformers has no conversion (a test asks it): a module that is on disk under
its name is that weight, and nothing needs to be imported or built to know it."""

WITHOUT_CONV1D = UNCONVERTED - {"gpt2"}
"""Those of them none of whose dense weights are stored as [I, O]."""


class Names:
    """Where the weights that adapters name are on disk.

    Args:
        config: config.json of the base.
        disk: name → shape of every weight on disk (of its values: [O, I] for a packed matrix).

    Attributes:
        config, disk: as given.

    Nothing is imported or built before a key needs it.
    """

    def __init__(self, config: Mapping[str, object], disk: Mapping[str, Sequence[int]]) -> None:
        self.config = config
        self.disk: dict[str, Shape] = {name: tuple(shape) for name, shape in disk.items()}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Names:
        """Names of a checkpoint's weights."""
        return cls(checkpoint.config, {name: weight.shape for name, weight in checkpoint.weights.items()})

    def parameter_of(self, weight: str) -> str | None:
        """The (first) parameter in memory that a weight on disk becomes, or becomes a part of; None: it is not loaded.

        Where transformers does not know the architecture, names in memory are taken to be those on disk.
        """
        if self._tracer is None:
            return weight if weight in self.disk else None
        renamed = self._tracer.renamed.get(weight)
        return renamed.parameter if renamed else None

    def blocks_of(self, key: str) -> tuple[DiskBlock, ...] | None:
        """Where the weight is on disk that an adapter names.

        Args:
            key: name of a module or of a parameter, in the old or the new spelling, with or without the base model's
                prefix (``base_model.model.`` and ``.lora_A.weight`` are removed already).

        Returns:
            Blocks that cover the weight exactly once. None: it is not on disk, or the name means more than one.

        Raises:
            CheckpointError: transformers makes the parameter by more than rearranging, or the weights on disk do not
                make up its shape.
        """
        candidates = [name for name in (f"{key}.weight", key) if name]
        if self.config.get("model_type") in UNCONVERTED or self._tracer is None:
            on_disk = [name for name in candidates if name in self.disk]
            if len(on_disk) == 1:
                return (whole_weight(on_disk[0], on_disk[0], self.disk[on_disk[0]]),)
            if self._tracer is None:
                return None
        matches: list[tuple[DiskBlock, ...]] = []
        for name in candidates:
            blocks = self._tracer.blocks(name)
            if blocks is not None:
                matches.append(blocks)
        return matches[0] if len(matches) == 1 else None

    def targeted_parameter(self, key: str, target_parameters: Iterable[str]) -> str:
        """The parameter that a key of a peft adapter with ``target_parameters`` belongs to; any other key as it is.

        peft wraps the targeted parameters of a module in the order of their declaration, each wrapper around the one
        before: with two of them, ``experts.base_layer`` is the first and ``experts`` the second
        (peft/tuners/tuners_utils.py, _inject_parameters).
        """
        module = key
        depth = 0
        while module.endswith(".base_layer"):
            module = module.removesuffix(".base_layer")
            depth += 1
        targeted = self.targeted_parameters_in(module, target_parameters)
        return targeted[-1 - depth] if depth < len(targeted) else key

    def targeted_parameters_in(self, module: str, target_parameters: Iterable[str]) -> list[str]:
        """Full names of the targeted parameters that a module itself declares, in the order of their declaration."""
        targets = tuple(target_parameters)
        if not targets:
            return []
        if self._tracer is not None:
            declared = self._tracer.conversion.parameters_in(module)
        else:
            declared = [name for name in self.disk if name.rpartition(".")[0] == module]
        targeted = [name for name in declared if any(f".{name}".endswith(f".{target}") for target in targets)]
        # The disk does not say in which order a module declares its parameters.
        return targeted if self._tracer is not None or len(targeted) == 1 else []

    @property
    def converted(self) -> frozenset[str]:
        """Parameters in memory that transformers makes by an operation: of a part of a weight on disk, or of several weights.

        Its loaders cannot do that with quantized weights, not even with those that they have saved themselves.
        """
        return self._tracer.converted if self._tracer else frozenset()

    def is_transposed(self, parameter: str) -> bool:
        """Whether transformers marks a stack of experts as [E, I, O] (gpt-oss)."""
        return self._tracer is not None and self._tracer.conversion.is_transposed(parameter)

    @cached_property
    def _tracer(self) -> _Tracer | None:
        """None where transformers does not know the architecture."""
        try:
            model = meta_model(self.config)
        except CheckpointError:
            return None
        return _Tracer(Conversion(model), self.disk)


class _Tracer:
    """Which weights of one checkpoint make which parameters, and which part of a parameter each of them is.

    Args:
        disk: name → shape of every weight on disk.

    Attributes:
        renamed: weight on disk → its parameter; weights that the model does not load are left out.
    """

    def __init__(self, conversion: Conversion, disk: Mapping[str, Shape]) -> None:
        from transformers.core_model_loading import dot_natural_key

        self.conversion = conversion
        self._disk = disk
        self.renamed: dict[str, Renamed] = {}
        # First parameter that a converter makes (or the only one) → the weights on disk that it is made of.
        self._sources: dict[str, list[str]] = {}
        # Any parameter → the first one that is made together with it.
        self._first_target: dict[str, str] = {}
        # Canonical name of a weight that goes through a converter → its names on disk (one, in a sound file).
        self._by_canonical_name: dict[str, list[str]] = {}
        self._traced: dict[str, TracedTensor] = {}
        self._parts: dict[str, dict[str, TracedTensor]] = {}
        for name in sorted(disk, key=dot_natural_key):  # the order in which transformers stacks experts
            self._add(name)

    def _add(self, name: str) -> None:
        """Collect a weight as convert_and_load_state_dict_in_model does (transformers/core_model_loading.py)."""
        renamed = self.conversion.rename(name)
        if renamed.parameter not in self.conversion.parameters:
            return
        self.renamed[name] = renamed
        self._sources.setdefault(renamed.parameter, []).append(name)
        for target in self.conversion.targets(renamed):
            self._first_target.setdefault(target, renamed.parameter)
        if renamed.pattern is not None:
            self._by_canonical_name.setdefault(self.conversion.canonical_name(name), []).append(name)

    @property
    def converted(self) -> frozenset[str]:
        """Parameters that a converter makes of weights that are on disk."""
        by_pattern = (name for name, first in self._first_target.items() if self._pattern_of(first) is not None)
        return frozenset(by_pattern)

    def _pattern_of(self, parameter: str) -> str | None:
        return self.renamed[self._sources[parameter][0]].pattern

    def blocks(self, name: str) -> tuple[DiskBlock, ...] | None:
        """Where a weight is on disk, by its full name in any spelling; None where it is not, or not just once."""
        if name in self.conversion.parameters:
            # A name of memory may also be that of a weight on disk, which transformers loads into another parameter.
            is_another_weight = name in self._disk and name not in self._sources_of(name)
            return None if is_another_weight else self._blocks_of_parameter(name)
        renamed = self.conversion.rename(name)
        if renamed.parameter not in self.conversion.parameters:
            return None
        if renamed.pattern is None:
            return self._blocks_of_parameter(renamed.parameter)
        return self._blocks_of_part(name, renamed)

    def _sources_of(self, parameter: str) -> list[str]:
        return self._sources.get(self._first_target.get(parameter, parameter), [])

    def _blocks_of_parameter(self, parameter: str) -> tuple[DiskBlock, ...] | None:
        sources = self._sources_of(parameter)
        if not sources:
            self._check_not_shared(parameter)
            return None
        return None if self._is_on_disk_twice(sources) else self._disk_blocks(parameter, self._trace(parameter))

    def _is_on_disk_twice(self, sources: list[str]) -> bool:
        """Whether one of several weights is all of the parameter: under another spelling, or as a stack next to its experts."""
        return len(sources) > 1 and any(self.renamed[name].pattern is None for name in sources)

    def _check_not_shared(self, parameter: str) -> None:
        """Raise CheckpointError where a parameter has no weight on disk because transformers gives it another one's values."""
        shared = self.conversion.shared.get(parameter)
        if shared is not None and self._sources_of(shared):
            raise CheckpointError(
                f"{parameter} is stored only once, as {shared}, which this architecture uses in several layers. The adapter "
                f"changes it in one of them, so one weight cannot hold the result: use the adapter unmerged, or train "
                f"one that leaves this layer out"
            )

    def _blocks_of_part(self, name: str, renamed: Renamed) -> tuple[DiskBlock, ...] | None:
        """A name that only converters know: one expert's ``w1``.

        It is a weight on disk, or a part of one: newer files have the experts stacked already.
        """
        if self._is_on_disk_twice(self._sources_of(renamed.parameter)):
            return None
        canonical_name = self.conversion.canonical_name(name)
        on_disk = self._by_canonical_name.get(canonical_name, [])
        if len(on_disk) == 1:
            return (whole_weight(on_disk[0], renamed.parameter, self._disk[on_disk[0]]),)
        if on_disk or not all(self._sources_of(target) for target in self.conversion.targets(renamed)):
            return None
        if renamed.parameter not in self._parts:
            self._parts[renamed.parameter] = self._split(renamed)
        part = self._parts[renamed.parameter].get(canonical_name)
        return None if part is None else self._disk_blocks(renamed.parameter, part)

    def _split(self, renamed: Renamed) -> dict[str, TracedTensor]:
        """Canonical name → part of the parameters that a converter makes, split again as transformers does to save."""
        assert renamed.pattern is not None
        parameters = {target: self._trace(target) for target in self.conversion.targets(renamed)}
        with self._naming_errors(renamed.parameter, list(parameters), renamed.pattern):
            parts = self.conversion.split(parameters, renamed.pattern)
        return _all_traced(parts)

    def _trace(self, parameter: str) -> TracedTensor:
        """A parameter, made by transformers' own conversion of traced weights."""
        if parameter not in self._traced:
            first = self._first_target.get(parameter, parameter)
            names = self._sources[first]
            pattern = self.renamed[names[0]].pattern
            if pattern is None:
                self._traced[parameter] = traced_weight(names[0], self._disk[names[0]])
            else:
                self._traced.update(self._join(first, names, pattern))
            if parameter not in self._traced:
                raise CheckpointError(f"transformers does not make {parameter} of {listed(names)}")
        return self._traced[parameter]

    def _join(self, parameter: str, names: list[str], pattern: str) -> dict[str, TracedTensor]:
        """Everything that a converter makes of these weights, by name in memory."""
        sources: list[Source] = []
        for name in names:
            sources.append(Source(name, self.renamed[name].pattern, traced_weight(name, self._disk[name])))
        with self._naming_errors(parameter, names, pattern):
            joined = _all_traced(self.conversion.join(parameter, sources))
        for name, tensor in joined.items():
            expected = self.conversion.parameters.get(name)
            if expected is not None and tensor.shape != expected.shape:
                raise CheckpointError(
                    f"{name} is {list(expected.shape)}, but {listed(names)} on disk make up {list(tensor.shape)}. "
                    f"Download the model again"
                )
        return joined

    def _disk_blocks(self, parameter: str, tensor: TracedTensor) -> tuple[DiskBlock, ...]:
        shape = tuple(tensor.shape)
        blocks: list[DiskBlock] = []
        for piece in tensor.pieces:
            blocks.append(disk_block(piece, self._disk[piece.weight], parameter=parameter, shape=shape))
        return tuple(blocks)

    @contextmanager
    def _naming_errors(self, parameter: str, sources: list[str], pattern: str) -> Iterator[None]:
        """Errors inside name the weight that transformers makes, of which ones, and how."""
        try:
            yield
        except Exception as cause:  # operations raise whatever torch raises
            raise CheckpointError(
                f"{parameter}, which transformers makes of {listed(sources)} by {self.conversion.operations(pattern)}, cannot be "
                f"traced to the disk: {cause}"
            ) from cause


def _all_traced(tensors: Mapping[str, Tensor]) -> dict[str, TracedTensor]:
    traced: dict[str, TracedTensor] = {}
    for name, tensor in tensors.items():
        assert isinstance(tensor, TracedTensor), f"{name} is not made of traced tensors"
        traced[name] = tensor
    return traced
