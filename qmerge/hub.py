"""Folders and Hub ids → local folders. A revision is resolved to a commit once, and every file comes from that commit."""

from __future__ import annotations

import errno
import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path

from qmerge.errors import InputError, first_line

MODEL_FILES = [
    "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md",
    "adapter_model.bin",
]  # fmt: skip
"""Patterns of the files that are downloaded."""

UNUSED_FILES = ["original/*", "consolidated*", "*.gguf", "onnx/*", "openvino/*"]
"""Patterns of files that are left on the Hub: the same weights in other formats."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``owner/name``."""

GGUF = ".gguf"

SHOWN = 100
"""Characters that a message shows of a name that is not valid."""

HUB_FILE = re.compile(rf"(?P<id>{HUB_ID.pattern}):(?P<file>(?!.*\.\.)[\w./-]+\.gguf)")
"""``owner/name:file.gguf``."""

HUB_REVISION = re.compile(rf"(?P<id>{HUB_ID.pattern})@(?P<revision>\w[\w./-]*)(?P<rest>[:#=].*)?")
"""``owner/name@revision``; behind it ``:file.gguf``, ``#NAME`` or ``=WEIGHT``."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapters.safetensors")
"""Tensors of an adapter, as PEFT and as MLX call the file."""

CHECKPOINT = re.compile(r"(?:checkpoint-|epoch_|step_)(?P<number>\d+)|last-checkpoint")
"""Folders with the states of a run: of Trainer, of torchtune, and of Trainer's pushes to the Hub."""

SAVED_BY_CALLBACK = "qmerge-adapter"
"""Folder in the trainer's ``output_dir`` that ``QmergeCallback`` saves the adapter to."""

HUB_URL = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>{HUB_ID.pattern}?)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#=]+)(?:/(?P<path>[^?#=]*))?)?/?"
    r"(?:\?(?:[^#=]|=(?![\d.]+$))*)?(?P<rest>[#=].*)?"
)
"""The address of a model in a browser: its page, a revision, a folder or a file; behind it ``#NAME`` or ``=WEIGHT``."""


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


def local_path(reference: str) -> Path | None:
    """The path that a text names, with the user's home folder for ``~``; None where no file can have this name."""
    try:
        reference.encode()  # a name that is not UTF-8 could not be written into a report
        path = Path(reference).expanduser()
        os.lstat(path)  # raises for names that are too long, which is_dir() and others do not catch
    except (RuntimeError, ValueError):  # ~nosuchuser; NUL or a lone surrogate
        return None
    except OSError as cause:
        return None if cause.errno == errno.ENAMETOOLONG else path
    return path


def resolve(reference: str, revision: str | None, error: type[InputError], adapter: str | None = None) -> Source:
    """The local folder of a model or an adapter.

    Args:
        reference: a folder, or a Hub id, which is downloaded or taken from the cache; offline mode works.
        revision: branch, tag or commit of a Hub id, which may also be in its name: ``owner/name@revision``.
        adapter: name of the adapter that is asked for, which may be an earlier state of a finished one.

    Raises:
        error: there is no such folder, and no such id on the Hub or in its cache.
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
        source = _download(hub_file["id"], revision, error, [hub_file["file"]])
        if not (source.folder / hub_file["file"]).is_file():
            raise error(f"{hub_file['id']} on the Hub has no file {hub_file['file']}")
        return replace(source, file=source.folder / hub_file["file"])
    if folder.suffix == GGUF:
        raise error(f"{reference}: no such file")
    if not HUB_ID.fullmatch(reference):
        raise error(f"{reference}: no such folder, and not a Hub id (owner/name) either")
    return _download(reference, revision, error, adapter=adapter)


def split_revision(reference: str) -> tuple[str, str | None]:
    """``owner/name@v2`` → (owner/name, v2), and the address of a model in a browser likewise.

    Any other text, and the name of a local folder, as it is, without a revision.
    """
    name = _without_url(reference)
    match = HUB_REVISION.fullmatch(name)
    if match is None or _is_local(reference):
        return name, None
    return match["id"] + (match["rest"] or ""), match["revision"]


def _without_url(reference: str) -> str:
    """The id, and the revision, that an address on the Hub stands for; any other text as it is.

    ``https://huggingface.co/owner/name/tree/v2`` → ``owner/name@v2``, also without ``https://``; ``hf://owner/name@v2``. Of a
    path in it, a GGUF file stays (``owner/name:file.gguf``), and a folder becomes the name of an adapter (``owner/name#folder``).
    """
    match = HUB_URL.fullmatch(reference.strip())
    if match is None or _is_local(reference):
        return reference.removeprefix("hf://")
    name, path, rest = match["id"], (match["path"] or "").rstrip("/"), match["rest"] or ""
    if match["revision"] not in (None, "main"):
        name = f"{name}@{match['revision']}"
    if path.endswith(GGUF):
        name = f"{name}:{path}"
    elif path and "." not in path and not rest.startswith("#"):
        name = f"{name}#{path}"
    return name + rest


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


def published_name(reference: str) -> str:
    """A folder or Hub id as an output may name it: without an absolute path, and without the user's name.

    Hub ids and relative paths stay as they are. The home folder becomes ``~``, which is read as any home; a folder in the
    current one gets its path from there, and any other its name alone. ``find_named`` finds it again.
    """
    if not reference:
        return reference
    try:
        path = Path(os.path.normpath(Path(reference).expanduser()))
    except RuntimeError:  # ~name of a user whom this machine does not know
        return Path(reference).name
    home = Path.home()
    if not path.is_absolute():
        # Such a path can lead through the user's home folder.
        return path.name if ".." in path.parts and home.name in path.parts else reference
    # In some containers, the home folder is the root.
    if path.is_relative_to(home) and home != Path(home.root):
        return f"~/{path.relative_to(home).as_posix()}"
    if path.is_relative_to(Path.cwd()):
        return path.relative_to(Path.cwd()).as_posix()
    return path.name


def find_named(name: str, output: Path) -> str:
    """Where an input that a finished folder names is on this machine: as it is named, else next to the folder.

    Args:
        name: from ``published_name``, with the weight or the name of an adapter behind it (``lora=0.7``, ``lora#math``).
        output: the finished folder.

    Returns:
        A name that leads there; ``name`` itself where it is not found: it may be a Hub id.
    """
    neighbour = str(output.resolve().parent / name)
    return neighbour if not _is_local(name) and _is_local(neighbour) else name


def is_found_again(reference: str, output: Path) -> bool:
    """Whether the name that a finished folder has for an input leads to this input from here.

    Args:
        reference: of the input, as it was given for the merge.
        output: the finished folder.
    """
    name = find_named(published_name(reference), output)
    return name == reference or Path(name).expanduser().resolve() == Path(reference).expanduser().resolve()


def may_exist(reference: str) -> bool:
    """Whether a name is that of something on this machine, or has the form of a Hub id."""
    name = split_revision(reference)[0].partition("#")[0]
    return _is_local(reference) or bool(HUB_ID.fullmatch(name) or HUB_FILE.fullmatch(name))


def _is_local(reference: str) -> bool:
    """Whether a folder or file has this name, or the part of it before ``=`` or ``#``."""
    names = (reference, reference.rpartition("=")[0], re.split("[=#]", reference)[0])
    paths = [local_path(name) for name in names if name]
    return any(path is not None and path.exists() for path in paths)


def _download(
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


def cache_folder() -> Path:
    """The cache of huggingface_hub on this machine."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve()
