"""The models and adapters that a recipe names, resolved to folders, with the content of their headers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmerge import hub
from qmerge.adapters.combining.chain import chained, check_new, check_order
from qmerge.adapters.combining.combined import combined
from qmerge.adapters.reading.folder import Adapter, read_adapter, read_config, trained_head
from qmerge.adapters.reading.named import find_adapter
from qmerge.adapters.reading.pickled import is_pickled, unpickled
from qmerge.checkpoint.folder import TOKENIZER
from qmerge.checkpoint.names import Names
from qmerge.checkpoint.replication import replicate_layers
from qmerge.checkpoint.scan import Checkpoint
from qmerge.combine.base import CombineSettings
from qmerge.errors import AdapterError, CheckpointError
from qmerge.gguf.adapter import extracted_adapter
from qmerge.gguf.base import gguf_file, open_model, places_of, read_gguf
from qmerge.planning.heads import head_note, with_head
from qmerge.recipe import CHAIN, Recipe
from qmerge.remote import open_remote
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.temporary import folder_until_exit
from qmerge.schema import merged_adapter_hashes
from qmerge.weights.parallel import one_torch_thread

OWN_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
"""An adapter with one of these files brings a tokenizer of its own."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The models and adapters of a run.

    base_source      where the base comes from
    adapter_sources  where the adapters come from, in the order of the recipe
    base             the base's config and headers; its layers are replicated where the adapter was trained so
    names            names of the base's weights, on disk and in memory
    adapters         the adapters, one by one
    adapter          what all adapters do together
    original_source  where the 16-bit original of the base comes from
    original         the original's config and headers
    other_tokenizer  folder with a tokenizer for a base and an adapter that have none; None where there is none either
    head_note        that the adapter brings the head of another class of models, in one line; empty where it does not
    """

    base_source: hub.Source
    adapter_sources: tuple[hub.Source, ...]
    base: Checkpoint
    names: Names
    adapter: Adapter
    adapters: tuple[Adapter, ...]
    original_source: hub.Source | None = None
    original: Checkpoint | None = None
    other_tokenizer: Path | None = None
    head_note: str = ""

    @property
    def adapter_source(self) -> hub.Source:
        """Source of the first adapter, whose name and tokenizer the output takes."""
        return self.adapter_sources[0]

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of the tokenizer: the adapter's where it brings one, else the base's, else ``other_tokenizer``."""
        # Training may have added tokens to it.
        if _has_any(self.adapter_files_folder, OWN_TOKENIZER):
            return self.adapter_files_folder
        # A merged folder, whose user may have added the missing files to it.
        if self.other_tokenizer is not None and not _has_any(self.base.folder, TOKENIZER):
            return self.other_tokenizer
        return self.base.folder

    @property
    def adapter_files_folder(self) -> Path:
        """Folder of the adapter's tokenizer and chat template, if it has any: its own, or the one that holds several
        adapters with a common tokenizer."""
        own, parent = self.adapter.folder, self.adapter_source.adapters_folder
        if parent is None or _has_any(own, TOKENIZER):
            return own
        return parent


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def read_inputs(recipe: Recipe, reader: Reader, *, headers_only: bool = False) -> Inputs:
    """Resolve the models and adapters of a recipe (from the Hub if need be), and read their headers.

    Args:
        headers_only: leave the weights of models on the Hub there; ``reader`` gets those ranges that are asked for.

    Raises:
        CheckpointError, AdapterError, RecipeError: an input cannot be read, or the adapters cannot be combined.
    """
    base_source = _model_source(recipe.base, recipe.revision, reader if headers_only else None)
    adapter_sources = tuple(find_adapter(name, recipe.adapter_revision) for name, _ in recipe.adapters)
    adapter_sources = tuple(_as_safetensors(source, recipe.allow_pickle) for source in adapter_sources)
    # layer_replication changes the names that the adapter has, so it is read before the adapter itself.
    ranges = layer_replication([source.folder for source in adapter_sources if source.file is None])
    original_source, original = None, None
    if recipe.original:
        original_source = _model_source(recipe.original, recipe.original_revision, reader if headers_only else None)
        original = read_checkpoint(original_source.folder, reader, ranges)
    file = base_source.file or gguf_file(base_source.folder)
    if file is not None:
        base: Checkpoint = read_gguf(file, original)
        base_source = replace(base_source, file=file, folder=base.folder)  # where its config and tokenizer are
    else:
        base = read_checkpoint(base_source.folder, reader, ranges)
    adapter_sources = tuple(_as_folder(source, base) for source in adapter_sources)
    stored_base = base
    for source in adapter_sources:
        base = with_head(base, *trained_head(source.folder, source.adapter))
    names = Names.of(base)
    with one_torch_thread():  # for many small tensors, more threads only wait for one another
        adapters = tuple(read_adapter(source.folder, reader, source.adapter, names) for source in adapter_sources)
    return Inputs(
        base_source=base_source,
        adapter_sources=adapter_sources,
        base=base,
        names=names,
        adapter=as_one(recipe, adapters, merged_adapter_hashes(base.folder)),
        adapters=adapters,
        original_source=original_source,
        original=original,
        head_note="" if base is stored_base else head_note(base),
    )


def _model_source(reference: str, revision: str | None, remote_reader: Reader | None) -> hub.Source:
    """Where a model is: downloaded, or on the Hub with its headers here if a reader for that is given."""
    if remote_reader is not None:
        source = open_remote(reference, revision, remote_reader)
        if source is not None:
            return source
    return hub.resolve(reference, revision, CheckpointError)


def _as_safetensors(source: hub.Source, allow_pickle: bool) -> hub.Source:
    """An adapter with its tensors in a pickle, as a folder with a safetensors file; others, and without leave, as they are."""
    if not allow_pickle or source.file is not None or not is_pickled(source.folder):
        return source
    return replace(source, folder=unpickled(source.folder, folder_until_exit()))


def _as_folder(source: hub.Source, base: Checkpoint) -> hub.Source:
    """An adapter that is a GGUF file, as the folder that PEFT would have saved; others as they are."""
    if source.file is None:
        return source
    return replace(source, folder=extracted_adapter(source.file, places_of(base)))


def as_one(recipe: Recipe, adapters: Sequence[Adapter], merged_files: Collection[str]) -> Adapter:
    """What the recipe's adapters do together.

    Args:
        merged_files: SHA-256 of the files of adapters that are already merged into the base.

    Raises:
        AdapterError, RecipeError: they cannot be combined, or one was trained on another one that is not given.
    """
    check_new(adapters, merged_files)
    if recipe.combine == CHAIN:
        return chained(adapters, merged_files)
    weights = [weight for _, weight in recipe.adapters]
    if len(adapters) == 1:
        # Where several adapters are combined, it is a warning (base_check.declared).
        check_order(adapters, merged_files)
    if weights == [1.0]:
        return adapters[0]
    return combined(adapters, weights, recipe.combine, CombineSettings(density=recipe.density, seed=recipe.seed))


def read_checkpoint(folder: Path, reader: Reader, ranges: Any) -> Checkpoint:
    """Config and headers of a model.

    Args:
        ranges: ``layer_replication`` of the adapter, which repeats layers of the base; None for the layers on disk.
    """
    checkpoint = open_model(folder, reader)
    return replicate_layers(checkpoint, ranges) if ranges else checkpoint


def layer_replication(folders: Sequence[Path]) -> Any:
    """``layer_replication`` of the adapters' configs; None where they have none.

    Raises:
        AdapterError: it differs between the adapters.
    """
    values = []
    for folder in folders:
        values.append(read_config(folder).get("layer_replication") or None)
    if not values:
        return None
    for folder, ranges in zip(folders, values, strict=True):
        if ranges != values[0]:
            raise AdapterError(
                f"layer_replication is {values[0]} in {folders[0]}, {ranges} in {folder}: these adapters were trained on "
                f"different models; merge one of them"
            )
    return values[0]
