"""Where the recipe's inputs are, and what their headers say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qmerge import hub
from qmerge.adapters._combined import combined
from qmerge.adapters._folder import Adapter, read_adapter
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.combine._common import Settings
from qmerge.errors import AdapterError, CheckpointError
from qmerge.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Where the recipe's inputs are, and what their headers say."""

    base_source: hub.Source
    adapter_sources: tuple[hub.Source, ...]
    base: Checkpoint
    adapter: Adapter
    original_source: hub.Source | None = None
    original: Checkpoint | None = None

    @property
    def adapter_source(self) -> hub.Source:
        """The first adapter's: the one whose tokenizer and name are taken."""
        return self.adapter_sources[0]

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's, when it brings its own tokenizer, else the base's."""
        own = any((self.adapter.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return self.adapter.folder if own else self.base.folder


def read_inputs(recipe: Recipe, reader: Reader) -> Inputs:
    base_source = hub.resolve(recipe.base, recipe.revision, CheckpointError)
    sources = tuple(hub.resolve(name, recipe.adapter_revision, AdapterError) for name, _ in recipe.adapters)
    base, adapters = scan(base_source.folder, reader), [read_adapter(source.folder, reader) for source in sources]
    weights = [weight for _, weight in recipe.adapters]
    settings = Settings(density=recipe.density, seed=recipe.seed)
    adapter = adapters[0] if weights == [1.0] else combined(adapters, weights, recipe.combine, settings)
    original_source = (
        hub.resolve(recipe.original, recipe.original_revision, CheckpointError) if recipe.original else None
    )
    original = scan(original_source.folder, reader) if original_source else None
    return Inputs(base_source, sources, base, adapter, original_source, original)
