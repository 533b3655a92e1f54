"""The model in an output folder, opened for a check."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qmerge import hub
from qmerge.calibration.tasks import CAUSAL_LM, Task, task_of
from qmerge.checkpoint.architecture import embedding_weights
from qmerge.checkpoint.config import with_setting
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, QmergeError
from qmerge.gguf.base import gguf_file, open_model
from qmerge.gguf.header import read_header
from qmerge.gguf.output import EMBEDDING
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, read_report
from qmerge.types import Weight


def open_merged(folder: Path, reader: Reader) -> Checkpoint:
    """A model that qmerge wrote. Config and names of a GGUF file are those of its base (or original), where that is at hand.

    Raises:
        CheckpointError: it cannot be read.
    """
    file = gguf_file(folder)
    if file is None:
        return open_model(folder, reader)
    source = _source_of(folder, reader)
    return open_model(folder, reader, source and _with_rows_of(source, file))


def task_of_folder(folder: Path) -> Task:
    """What the model in a folder does; text generation where the folder has no config (GGUF)."""
    path = folder / "config.json"
    return task_of(read_json(path, CheckpointError)) if path.is_file() else CAUSAL_LM


def _with_rows_of(source: Checkpoint, file: Path) -> Checkpoint:
    """The model with as many tokens as a GGUF file that was made from it: the adapter may have resized the vocabulary."""
    embedding = read_header(file).tensors.get(EMBEDDING)
    names = embedding_weights(source.config)
    if embedding is None or names is None or names[0] not in source.weights:
        return source
    rows = embedding.shape[0]
    if rows == source.weights[names[0]].shape[0]:
        return source
    resized: dict[str, Weight] = {}
    for name in names:
        if name in source.weights:  # a tied output embedding is not stored
            weight = source.weights[name]
            resized[name] = replace(weight, shape=(rows, *weight.shape[1:]))
    config = with_setting(source.config, "vocab_size", rows)
    return replace(source, config=config, weights={**source.weights, **resized})


def _source_of(folder: Path, reader: Reader) -> Checkpoint | None:
    """The Hugging Face model that a GGUF file in a folder was made from; None where it is not at hand."""
    if not (folder / NAME).is_file():
        return None
    recipe = read_report(folder).recipe
    for role, revision in (("original", "original_revision"), ("base", "revision")):
        reference = recipe.get(role)
        found = hub.find_local(hub.find_named(reference, folder), recipe.get(revision)) if reference else None
        if found is not None:
            try:
                return scan(found, reader)
            except QmergeError:  # then the file itself may say enough
                continue
    return None
