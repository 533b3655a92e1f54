"""Which adapter is meant where a folder contains several: ``DIR#NAME``, also for Hub ids.

PEFT saves the adapter called ``default`` in the folder itself and every other one in a folder of its name below it
(``PeftModel.save_pretrained``). Other tools save all of them in one file, with their names inside the tensors' names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from qmerge import hub
from qmerge.adapters.reading.folder import CONFIG, DEFAULT, adapter_names, tensor_infos, tensors_file
from qmerge.adapters.reading.mistakes import folder_of_file
from qmerge.adapters.reading.training_folder import checkpoint_number
from qmerge.errors import AdapterError, listed

MOST_NAMES = 20
"""Names that an error lists."""


def find_adapter(reference: str, revision: str | None = None) -> hub.Source:
    """The folder of an adapter, or its GGUF file.

    Args:
        reference: folder, file or Hub id, with ``#NAME`` where it contains several adapters. A folder of a training run that
            has no finished adapter stands for what ``QmergeCallback`` saved there, else for its last checkpoint.
        revision: on the Hub.

    Raises:
        AdapterError: it cannot be downloaded; it contains several adapters and none is named; it has none of this name.
    """
    reference, named_revision = hub.split_revision(reference)
    revision = revision or named_revision
    location, name = split_reference(reference)
    source = hub.resolve(folder_of_file(location), revision, AdapterError, name)
    return source if source.file else choose_adapter(source, location, name)


def choose_adapter(source: hub.Source, location: str, name: str | None) -> hub.Source:
    """The source of one adapter among those in a folder.

    Args:
        source: the folder.
        location: how the user spelled it, for errors.
        name: of the adapter; None where the user named none.

    Raises:
        AdapterError: it contains several adapters and none is named; it has none of this name.
    """
    folders = adapters_in(source.folder)
    if name is None:
        return _only_adapter(source, location, folders)
    if not folders:
        raise AdapterError(
            f"{location} contains no adapter, so none that is called {name!r}: expected {CONFIG} as PEFT saves it"
        )
    if name not in folders:
        problem = f"{location} contains no adapter {name!r}; there are"
        raise AdapterError(f"{problem}: {_choices(location, list(folders))}")
    if folders[name] == source.folder:
        return replace(source, adapter=name, adapters_folder=None)
    return replace(source, folder=folders[name], adapter=name, adapters_folder=source.folder)


def _only_adapter(source: hub.Source, location: str, folders: dict[str, Path]) -> hub.Source:
    """The source as it is, or the last state of a training run, where there is nothing to choose. Without any adapter,
    reading it will raise the error."""
    in_folder = [name for name, folder in folders.items() if folder == source.folder]
    below: list[str] = []
    states: list[str] = []
    for name, folder in folders.items():
        if folder != source.folder:
            (states if hub.is_state_of_run(name) else below).append(name)
    # Next to a finished adapter, these are its earlier states, or copies of it, not other adapters.
    if not folders or (len(in_folder) == 1 and not below):
        return source
    # States of one training: the last one is the most trained.
    if states and not in_folder and not below:
        last = _last_state(states)
        return replace(source, folder=folders[last], adapter=last, adapters_folder=folders[last].parent)
    if not in_folder:
        below += states
    raise AdapterError(f"{location} contains the adapters: {_choices(location, [*in_folder, *below])}")


def _last_state(names: list[str]) -> str:
    """``QmergeCallback`` saves when the training ends, after the last checkpoint, and of several checkpoints the best one."""
    return hub.SAVED_BY_CALLBACK if hub.SAVED_BY_CALLBACK in names else max(names, key=checkpoint_number)


def _choices(location: str, names: list[str]) -> str:
    options = " or ".join(f"--adapter {location}#{name}" for name in names[:MOST_NAMES])
    return f"{listed(names, MOST_NAMES)}. Choose one: {options}"


def split_reference(reference: str) -> tuple[str, str | None]:
    """``DIR#math`` → (DIR, math). A folder with a # in its own name is taken as it is."""
    location, _, name = reference.rpartition("#")
    folder = hub.local_path(reference)
    if not location or not name or (folder is not None and folder.is_dir()):
        return reference, None
    return location, name


def adapters_in(folder: Path) -> dict[str, Path]:
    """Name → folder of every adapter: in the folder itself (several, where its file contains several), and below it.

    ms-swift gives each run a folder of its own (``v0-20260102-030405/checkpoint-60``): where nothing else is found, those of
    the only run count.
    """
    adapters: dict[str, Path] = {}
    if (folder / CONFIG).is_file():
        names = adapter_names(tensor_infos(folder)) if tensors_file(folder).is_file() else []
        # Of a single adapter the file may contain the name, but peft does not ask for it.
        adapters |= dict.fromkeys(names if len(names) > 1 else [DEFAULT], folder)
    for config in sorted(folder.glob(f"*/{CONFIG}")):
        if config.is_file():
            # The adapter in the folder itself goes before a folder below that is called ``default``.
            adapters.setdefault(config.parent.name, config.parent)
    if not adapters:
        found = [config.parent for config in folder.glob(f"*/*/{CONFIG}") if hub.is_state_of_run(config.parent.name)]
        if len({checkpoint.parent for checkpoint in found}) == 1:
            adapters = {checkpoint.name: checkpoint for checkpoint in sorted(found)}
    return adapters
