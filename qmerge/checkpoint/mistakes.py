"""What a folder is that was given as a model and has no config.json: each mistake gets its own hint. (Imports no torch.)"""

from __future__ import annotations

from pathlib import Path

from qmerge.checkpoint.documents import read_json
from qmerge.errors import CheckpointError
from qmerge.hub import ADAPTER_CONFIG


def missing_config_problem(folder: Path) -> str:
    """One line: why a folder without config.json is not a model, and how to go on."""
    if (folder / ADAPTER_CONFIG).is_file():
        named = _named_base(folder)
        its_base = f" ({named})" if named else ""
        return (
            f"{folder} is an adapter, not a model: give it with --adapter. The base is the model that it was trained on{its_base}; "
            f"without --base, qmerge takes the one that the adapter names"
        )
    # Folders that hold the model one or two levels below.
    inside = sorted(path.parent for path in folder.glob("*/config.json"))
    snapshots = sorted(path.parent for path in folder.glob("snapshots/*/config.json"))
    if (folder / "model_index.json").is_file():
        return f"{folder} is a pipeline of diffusers (image models): qmerge merges adapters of transformers models only"
    if (folder / "params.json").is_file():
        return (
            f"{folder} has no config.json, but params.json: a model in Meta's or Mistral's own form. Give the same model in "
            f"the form of transformers (on the Hub, the repository whose name ends in -hf, or the folder above original/)"
        )
    if snapshots:
        return f"{folder} is a folder of the Hub's cache: give the model's id, or {snapshots[-1]}"
    if inside:
        return f"{folder} has no config.json, but {inside[-1]} has one: give that folder"
    return f"{folder} has no config.json: expected the folder of a model in the form of transformers"


def _named_base(folder: Path) -> str:
    try:
        return str(read_json(folder / ADAPTER_CONFIG, CheckpointError).get("base_model_name_or_path") or "")
    except CheckpointError:
        return ""
