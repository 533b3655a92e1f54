"""A model of the Hub in the cache of this machine: at one commit, and only the files that are needed."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from qmerge.errors import InputError, first_line
from qmerge.hub.files import list_files, needed_weights

MODEL_FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md",
    "adapter_model.bin",
]  # fmt: skip
"""Patterns of the files that are downloaded."""

UNUSED_FILES = ["original/*", "consolidated*", "*.gguf", "onnx/*", "openvino/*"]
"""Patterns of files that are left on the Hub: the same weights in other formats."""


@dataclass(frozen=True)
class Source:
    """Where a model or an adapter comes from.

    folder           local folder with its files
    file             the file in it, where the model is one file (GGUF)
    id, commit       of the Hub; None for a local folder
    adapter          name of the adapter that was asked for, where there are several
    adapters_folder  the folder above, where several adapters have a folder each; None for all others
    """

    folder: Path
    id: str | None = None
    commit: str | None = None
    adapter: str | None = None
    adapters_folder: Path | None = None
    file: Path | None = None

    @property
    def name(self) -> str:
        """The Hub id, or the last part of a local folder, with ``#ADAPTER`` where it holds several adapters."""
        model_name = self.id or self.folder.name
        if self.file is not None:
            model_name = self.file.stem
        if self.adapter and model_name != self.adapter:
            return f"{model_name}#{self.adapter}"
        return model_name


_DOWNLOADED: ContextVar[dict[tuple[object, ...], Source] | None] = ContextVar("downloaded", default=None)


@contextmanager
def one_commit_each() -> Iterator[None]:
    """Inside, the Hub is asked once about each id, and an id means one commit all the time, whoever pushes meanwhile."""
    token = _DOWNLOADED.set({})
    try:
        yield
    finally:
        _DOWNLOADED.reset(token)


def download(
    hub_id: str,
    revision: str | None,
    error: type[InputError],
    files: list[str] | None = None,
    adapter: str | None = None,
) -> Source:
    """A snapshot of a model in the cache: of these files, or of those that a model needs. See ``one_commit_each``."""
    downloaded = _DOWNLOADED.get()
    key = (hub_id, revision, tuple(files or ()), adapter)
    source = (downloaded or {}).get(key) or _snapshot(hub_id, revision, error, files, adapter)
    if downloaded is not None:
        downloaded[key] = source
    return source


def _snapshot(
    hub_id: str, revision: str | None, error: type[InputError], files: list[str] | None, adapter: str | None
) -> Source:
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    try:
        listing = list_files(hub_id, revision)
        commit = listing.commit if listing else None
        ignored = [] if files else UNUSED_FILES
        if listing and not files:
            weights = {name for name in listing.names if name.endswith(".safetensors")}
            ignored = [*ignored, *map(glob.escape, weights - needed_weights(listing, adapter))]
        folder = huggingface_hub.snapshot_download(
            hub_id,
            revision=commit or revision,
            allow_patterns=files or MODEL_FILES,
            ignore_patterns=ignored or None,
            local_files_only=commit is None,  # offline: do not wait for the network again
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as cause:
        at_revision = f" at revision {revision}" if revision else ""
        if isinstance(cause, LocalEntryNotFoundError | OfflineModeIsEnabled):
            # The library's advice is about its own arguments, which are not options here.
            is_asked_for = huggingface_hub.constants.is_offline_mode()
            reason = (
                "is not asked (offline, because HF_HUB_OFFLINE is set)"
                if is_asked_for
                else "cannot be reached (offline)"
            )
            raise error(
                f"{hub_id}{at_revision}: no such folder, and it is not in the Hub's cache on this machine, and the Hub {reason}: "
                f"get it where there is a network (hf download {hub_id}), or give a folder that you have"
            ) from cause
        if isinstance(cause, GatedRepoError):
            raise error(
                f"{hub_id} is gated: ask for access on its page (https://huggingface.co/{hub_id}), and log in with `hf auth login` "
                f"or set HF_TOKEN"
            ) from cause
        raise error(
            f"{hub_id}{at_revision}: no such folder, and it cannot be loaded from the Hub (or from its cache, offline): "
            f"{first_line(cause)}"
        ) from cause
    return Source(Path(folder), hub_id, commit or Path(folder).name)  # in the cache, a folder is named after its commit


def cache_folder() -> Path:
    """The cache of huggingface_hub on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()
