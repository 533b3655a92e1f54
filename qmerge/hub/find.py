"""The local folder of a model that is named by its path or its Hub id."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qmerge.errors import InputError
from qmerge.hub.download import Source, download
from qmerge.hub.names import GGUF, HUB_FILE, HUB_ID, local_path, split_revision

SHOWN = 100
"""Characters that a message shows of a name that is not valid."""


def resolve(reference: str, revision: str | None, error: type[InputError], adapter: str | None = None) -> Source:
    """The local folder of a model or an adapter.

    Args:
        reference: a folder, or a Hub id, which is downloaded or taken from the cache; offline mode works.
        revision: branch, tag or commit of a Hub id, which may also be in its name: ``owner/name@revision``.
        adapter: name of the adapter that is asked for, which may be an earlier state of a finished one.

    Raises:
        error: neither a folder, nor an id on the Hub or in its cache.
    """
    if not reference.strip():
        raise error("an empty name was given; expected a folder or a Hub id (owner/name)")
    reference, named_revision = split_revision(reference)
    if named_revision and revision not in (None, named_revision):
        raise error(f"{reference}: two revisions are given, {named_revision} in its name and {revision}; expected one")
    revision = revision or named_revision
    folder = local_path(reference)
    if folder is None:
        raise error(
            f"{reference[:SHOWN]!r}: no file or folder can have this name; expected a folder or a Hub id (owner/name)"
        )
    is_file = folder.suffix == GGUF and folder.is_file()
    if is_file or folder.is_dir():
        if revision:  # otherwise it would be ignored without a word
            raise error(f"{reference} is local: a revision ({revision}) makes sense for a Hub id only")
        if is_file:
            file = folder.absolute()  # not resolved: in the Hub cache, files are links to other names
            return Source(file.parent, file=file)
        return Source(folder.resolve())
    if folder.is_file():
        raise error(f"{reference} is a file: give its folder ({folder.parent}), or a GGUF file")
    hub_file = HUB_FILE.fullmatch(reference)
    if hub_file:
        source = download(hub_file["id"], revision, error, [hub_file["file"]])
        if not (source.folder / hub_file["file"]).is_file():
            raise error(f"{hub_file['id']} on the Hub has no file {hub_file['file']}")
        return replace(source, file=source.folder / hub_file["file"])
    if folder.suffix == GGUF:
        raise error(f"{reference}: no such file")
    if not HUB_ID.fullmatch(reference):
        raise error(f"{reference}: no such folder, and not a Hub id (owner/name) either")
    return download(reference, revision, error, adapter=adapter)


def find_local(reference: str, revision: str | None) -> Path | None:
    """The folder of a model that is on this machine, without asking the Hub; None where it is not.

    Args:
        reference: a folder, or a Hub id, which is looked up in the cache.
        revision: branch, tag or commit of a Hub id.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    folder = local_path(reference)
    if folder is not None and folder.is_dir():
        return folder.resolve()
    reference, named_revision = split_revision(reference)
    revision = named_revision or revision
    if not HUB_ID.fullmatch(reference):
        return None
    try:
        return Path(snapshot_download(reference, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None
