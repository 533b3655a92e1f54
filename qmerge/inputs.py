"""Where the recipe's inputs are, and what their headers say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qmerge import hub
from qmerge.adapters._folder import Adapter, read_adapter
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import AdapterError, CheckpointError
from qmerge.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """Where the recipe's inputs are, and what their headers say."""

    base_source: hub.Source
    adapter_source: hub.Source
    base: Checkpoint
    adapter: Adapter
    original_source: hub.Source | None = None
    original: Checkpoint | None = None

    @property
    def tokenizer_folder(self) -> Path:
        """The adapter's, when it brings its own tokenizer, else the base's."""
        own = any((self.adapter.folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return self.adapter.folder if own else self.base.folder


def read_inputs(recipe: Recipe, reader: Reader) -> Inputs:
    base_source = hub.resolve(recipe.base, recipe.revision, CheckpointError)
    adapter_source = hub.resolve(recipe.adapter, recipe.adapter_revision, AdapterError)
    base, adapter = scan(base_source.folder, reader), read_adapter(adapter_source.folder, reader)
    original_source = (
        hub.resolve(recipe.original, recipe.original_revision, CheckpointError) if recipe.original else None
    )
    original = scan(original_source.folder, reader) if original_source else None
    return Inputs(base_source, adapter_source, base, adapter, original_source, original)
