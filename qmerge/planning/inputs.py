"""Where the recipe's inputs are, and what their headers say."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge import hub
from qmerge.adapters.combining.chain import chained, check_new, check_order
from qmerge.adapters.combining.combined import combined
from qmerge.adapters.reading.folder import Adapter, config_file, read_adapter
from qmerge.adapters.reading.named import find
from qmerge.checkpoint.folder import TOKENIZER
from qmerge.checkpoint.names import Names
from qmerge.checkpoint.replication import replicate_layers
from qmerge.checkpoint.scan import Checkpoint, read_json, scan
from qmerge.combine.base import Settings
from qmerge.errors import AdapterError, CheckpointError
from qmerge.recipe import CHAIN, Recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import merged_into


@dataclass(frozen=True)
class Inputs:
    """Where the recipe's inputs are, and what their headers say. ``adapter``: what all ``adapters`` do together."""

    base_source: hub.Source
    adapter_sources: tuple[hub.Source, ...]
    base: Checkpoint
    names: Names
    adapter: Adapter
    adapters: tuple[Adapter, ...]
    original_source: hub.Source | None = None
    original: Checkpoint | None = None

    @property
    def adapter_source(self) -> hub.Source:
        """The first adapter's: the one whose tokenizer and name are taken."""
        return self.adapter_sources[0]

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's, when it brings its own tokenizer, else the base's."""
        own = any((self.beside_adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return self.beside_adapter if own else self.base.folder

    @property
    def beside_adapter(self) -> Path:
        """Where the adapter's tokenizer and chat template are, if it has any: in its own folder, else where several lie."""
        own, around = self.adapter.folder, self.adapter_source.adapters_folder
        return own if around is None or any((own / name).is_file() for name in TOKENIZER) else around


def as_one(recipe: Recipe, adapters: Sequence[Adapter], held: Collection[str]) -> Adapter:
    """What the recipe's adapters do together.

    Args:
        held: SHA-256 of the files of adapters that the base holds already.

    Raises:
        AdapterError, RecipeError: they cannot be combined, or one was trained on another that is not given.
    """
    check_new(adapters, held)
    if recipe.combine == CHAIN:
        return chained(adapters, held)
    weights = [weight for _, weight in recipe.adapters]
    if len(adapters) == 1:
        check_order(adapters, held)
    if weights == [1.0]:
        return adapters[0]
    return combined(adapters, weights, recipe.combine, Settings(density=recipe.density, seed=recipe.seed))


def read_inputs(recipe: Recipe, reader: Reader) -> Inputs:
    base_source = hub.resolve(recipe.base, recipe.revision, CheckpointError)
    sources = tuple(find(name, recipe.adapter_revision) for name, _ in recipe.adapters)
    original_source = (
        hub.resolve(recipe.original, recipe.original_revision, CheckpointError) if recipe.original else None
    )
    ranges = layer_replication([source.folder for source in sources])
    base = checkpoint(base_source.folder, reader, ranges)
    original = checkpoint(original_source.folder, reader, ranges) if original_source else None
    names = Names.of(base)
    adapters = tuple(read_adapter(s.folder, reader, s.adapter, names) for s in sources)
    adapter = as_one(recipe, adapters, merged_into(base.folder))
    return Inputs(base_source, sources, base, names, adapter, adapters, original_source, original)


def checkpoint(folder: Path, reader: Reader, ranges: Any) -> Checkpoint:
    """The model on disk, with its layers replicated where the adapter was trained so."""
    found = scan(folder, reader)
    return replicate_layers(found, ranges) if ranges else found


def layer_replication(folders: Sequence[Path]) -> Any:
    """What the adapters say of it, which must be the same."""
    said = [read_json(config_file(folder), AdapterError).get("layer_replication") or None for folder in folders]
    if any(ranges != said[0] for ranges in said):
        listed_ = ", ".join(f"{ranges} in {folder}" for ranges, folder in zip(said, folders, strict=True))
        raise AdapterError(f"layer_replication is {listed_}: these adapters were trained on different models")
    return said[0]
