"""Which files of a repository on the Hub a model, or an adapter, consists of."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors")
"""Tensors of an adapter, as PEFT and as MLX call the file."""

CHECKPOINT = re.compile(r"(?:checkpoint-|epoch_|step_)(?P<number>\d+)|last-checkpoint")
"""Folders with the states of a run: of Trainer, of torchtune, and of Trainer's pushes to the Hub."""

SAVED_BY_CALLBACK = "qmerge-adapter"
"""Folder in the trainer's ``output_dir`` that ``QmergeCallback`` saves the adapter to."""


@dataclass(frozen=True)
class Listing:
    """The files of a model on the Hub, at one commit."""

    id: str
    commit: str
    names: tuple[str, ...]


def list_files(hub_id: str, revision: str | None) -> Listing | None:
    """The commit that a revision means now, and its files. None offline: then the cache knows them.

    Raises:
        HfHubHTTPError, HFValidationError: the Hub has no such model, or refuses it.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        info = huggingface_hub.HfApi().model_info(hub_id, revision=revision)
    except (HfHubHTTPError, HFValidationError):
        raise
    except Exception:  # offline, or no connection: the class depends on the HTTP library that the Hub library uses
        return None
    return Listing(hub_id, str(info.sha), tuple(sibling.rfilename for sibling in info.siblings or []))


def needed_weights(listing: Listing, adapter: str | None = None) -> set[str]:
    """The safetensors files that a model, or the adapters in it, consist of.

    Other copies of the weights stay on the Hub: earlier states of a training, other dtypes, parts of other pipelines. Where
    nothing says which files belong together, all of them are needed.

    Args:
        adapter: name of the adapter that is asked for; its folder is needed, even if it is an earlier state.
    """
    names = {name for name in listing.names if name.endswith(".safetensors")}
    folders = {name.removesuffix(ADAPTER_CONFIG) for name in listing.names if name.endswith(ADAPTER_CONFIG)}
    needed: set[str] = set()
    # A repository without a finished adapter may be asked for one of its checkpoints.
    if "" in folders:
        wanted = [folder for folder in folders if not _is_earlier_state(folder) or folder == f"{adapter}/"]
        needed = {f"{folder}{file}" for folder in wanted for file in ADAPTER_FILES} & names
    if INDEX in listing.names:
        needed |= _files_in_index(listing) & names
    elif SINGLE in names:
        needed.add(SINGLE)
    return needed or names


def _is_earlier_state(folder: str) -> bool:
    """Whether a folder of a repository (``checkpoint-10/``) is in one that a training has left below a finished adapter."""
    return is_state_of_run(folder.partition("/")[0])


def is_state_of_run(name: str) -> bool:
    """Whether a folder of this name, in that of a training run, has a state of the adapter of the run, not another adapter."""
    return name == SAVED_BY_CALLBACK or CHECKPOINT.fullmatch(name) is not None


def _files_in_index(listing: Listing) -> set[str]:
    """The files that the index of a model names; a damaged index is an error later, when the model is read."""
    import huggingface_hub

    path = Path(huggingface_hub.hf_hub_download(listing.id, INDEX, revision=listing.commit))
    try:
        return {str(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return set(listing.names)
