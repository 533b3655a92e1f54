"""The model in an output folder, opened for a check."""

from __future__ import annotations

from pathlib import Path

from qmerge import hub
from qmerge.calibration.tasks import CAUSAL_LM, Task, task_of
from qmerge.checkpoint.documents import read_json
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, QmergeError
from qmerge.gguf.base import gguf_file, open_model
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, read_report


def open_merged(folder: Path, reader: Reader) -> Checkpoint:
    """A model that qmerge wrote. Config and names of a GGUF file are those of its base (or original), where that is at hand.

    Raises:
        CheckpointError: it cannot be read.
    """
    return open_model(folder, reader, _source_of(folder, reader) if gguf_file(folder) else None)


def task_of_folder(folder: Path) -> Task:
    """What the model in a folder does; text generation where the folder has no config (GGUF)."""
    path = folder / "config.json"
    return task_of(read_json(path, CheckpointError)) if path.is_file() else CAUSAL_LM


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
