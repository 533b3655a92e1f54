"""Names of models: folders, Hub ids, addresses; and as an output may name them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""``owner/name``."""

GGUF = ".gguf"

HUB_FILE = re.compile(rf"(?P<id>{HUB_ID.pattern}):(?P<file>(?!.*\.\.)[\w./-]+\.gguf)")
"""``owner/name:file.gguf``."""

HUB_REVISION = re.compile(rf"(?P<id>{HUB_ID.pattern})@(?P<revision>\w[\w./-]*)(?P<rest>[:#=].*)?")
"""``owner/name@revision``; behind it ``:file.gguf``, ``#NAME`` or ``=WEIGHT``."""

HUB_URL = re.compile(
    rf"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>{HUB_ID.pattern}?)"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>[^/?#=]+)(?:/(?P<path>[^?#=]*))?)?/?"
    r"(?:\?(?:[^#=]|=(?![\d.]+$))*)?(?P<rest>[#=].*)?"
)
"""The address of a model in a browser: its page, a revision, a folder or a file; behind it ``#NAME`` or ``=WEIGHT``."""


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


def split_revision(reference: str) -> tuple[str, str | None]:
    """``owner/name@v2`` → (owner/name, v2), and the address of a model in a browser likewise.

    Any other text, and the name of a local folder, as it is, without a revision.
    """
    name = _without_url(reference)
    match = HUB_REVISION.fullmatch(name)
    if match is None or is_local(reference):
        return name, None
    return match["id"] + (match["rest"] or ""), match["revision"]


def _without_url(reference: str) -> str:
    """The id, and the revision, that an address on the Hub stands for; any other text as it is.

    ``https://huggingface.co/owner/name/tree/v2`` → ``owner/name@v2``, also without ``https://``; ``hf://owner/name@v2``. Of a
    path in it, a GGUF file stays (``owner/name:file.gguf``), and a folder becomes the name of an adapter (``owner/name#folder``).
    """
    match = HUB_URL.fullmatch(reference.strip())
    if match is None or is_local(reference):
        return reference.removeprefix("hf://")
    name, path, rest = match["id"], (match["path"] or "").rstrip("/"), match["rest"] or ""
    if match["revision"] not in (None, "main"):
        name = f"{name}@{match['revision']}"
    if path.endswith(GGUF):
        name = f"{name}:{path}"
    elif path and "." not in path and not rest.startswith("#"):
        name = f"{name}#{path}"
    return name + rest


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
    return neighbour if not is_local(name) and is_local(neighbour) else name


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
    return is_local(reference) or bool(HUB_ID.fullmatch(name) or HUB_FILE.fullmatch(name))


def is_local(reference: str) -> bool:
    """Whether a folder or file has this name, or the part of it before ``=`` or ``#``."""
    names = (reference, reference.rpartition("=")[0], re.split("[=#]", reference)[0])
    paths = [local_path(name) for name in names if name]
    return any(path is not None and path.exists() for path in paths)
