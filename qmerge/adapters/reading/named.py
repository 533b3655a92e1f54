"""Which adapter is meant, where a folder holds several: ``DIR#NAME``, for Hub ids too.

PEFT saves the adapter called ``default`` in the folder itself and every other one in a folder of its name below it
(``PeftModel.save_pretrained``); other tools save all of them in one file, with the names inside the tensors' names.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from qmerge import hub
from qmerge.adapters.reading.folder import CONFIG, DEFAULT, TENSORS, names_in, tensor_infos
from qmerge.errors import AdapterError, listed

CHECKPOINT = re.compile(r"checkpoint-\d+|last-checkpoint")
"""What Trainer leaves below a finished adapter: earlier states of it, not others beside it."""

MOST_NAMES = 20


def find(reference: str, revision: str | None = None) -> hub.Source:
    """Folder or id, with ``#NAME`` where it holds several adapters → the folder that this one is in.

    Raises:
        AdapterError: it cannot be had; it holds several, and none is named; the name is none of theirs.
    """
    place, name = split(reference)
    return choose(hub.resolve(place, revision, AdapterError), place, name)


def choose(source: hub.Source, place: str, name: str | None) -> hub.Source:
    """The same where the folder or id, ``place``, is resolved already."""
    there = adapters_in(source.folder)
    if name in there:
        around = None if there[name] == source.folder else source.folder
        return replace(source, folder=there[name], adapter=name, adapters_folder=around)
    own = [known for known, folder in there.items() if folder == source.folder]
    others = [known for known in there if known not in own and not (own and CHECKPOINT.fullmatch(known))]
    if name is None and ((len(own) == 1 and not others) or not there):
        return source
    if name is not None and not there:
        raise AdapterError(
            f"{place} holds no adapter, so none that is called {name!r}: expected {CONFIG} as PEFT saves it"
        )
    problem = f"{place} holds no adapter {name!r}; there are" if name else f"{place} holds the adapters"
    spelled = [f"{place}#{known}" for known in (there if name else [*own, *others])]
    names = listed([known.rpartition("#")[2] for known in spelled], MOST_NAMES)
    raise AdapterError(f"{problem}: {names}. Say which: --adapter {' or --adapter '.join(spelled[:MOST_NAMES])}")


def split(reference: str) -> tuple[str, str | None]:
    """``DIR#math`` → (DIR, math); a folder that has a # in its own name is taken as it is."""
    place, _, name = reference.rpartition("#")
    return (place, name) if place and name and not Path(reference).expanduser().is_dir() else (reference, None)


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name → folder of every adapter that is there: in the folder itself (several, where its file holds several), and
    below it."""
    found: dict[str, Path] = {}
    if (folder / CONFIG).is_file():
        inside = names_in(tensor_infos(folder)) if (folder / TENSORS).is_file() else []
        found |= dict.fromkeys(inside if len(inside) > 1 else [DEFAULT], folder)
    below = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.is_file())
    return found | {path.name: path for path in below if path.name not in found}
