"""A merge that ends in a patch: the merged folder exists only while the patch is made, in a hidden folder next to it."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from qmerge import hub, run
from qmerge.adapters.reading.named import find_adapter
from qmerge.checkpoint.folder import LOCK, acquire_lock, locked
from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.patch.folders import check_file, model_files
from qmerge.patch.make import Summary, make_patch
from qmerge.progress import Progress
from qmerge.recipe import RAY, Recipe
from qmerge.safetensors_io.disk import disk_errors
from qmerge.schema import ReportData


def merge(recipe: Recipe, resume: bool, progress: Progress) -> tuple[ReportData, Summary | None]:
    """Merge into the folder ``out`` of the recipe, or into its ``patch``; the summary is that of the patch.

    Raises:
        RecipeError, InputError, NumbersError, RoomError: see ``errors.py``.
    """
    if recipe.workers == RAY:
        return run.merge_with_ray(recipe, resume, progress), None
    if recipe.patch is None:
        return run.merge(recipe, resume, progress), None
    if resume:
        raise RecipeError(
            "--resume: a run with --patch keeps nothing to resume from; start again without --resume, or use --out"
        )
    return merge_to_patch(recipe, Path(recipe.patch).expanduser(), progress)


def merge_to_patch(recipe: Recipe, file: Path, progress: Progress) -> tuple[ReportData, Summary]:
    """Merge into a temporary folder next to ``file``, write its difference to the base, and remove the folder.

    Raises:
        as ``merge``. Errors and Ctrl-C leave nothing behind.
    """
    base = hub.resolve(recipe.base, recipe.revision, CheckpointError)
    roles = {"the base": base.folder}
    for name, _ in recipe.adapters:
        adapter = find_adapter(name, recipe.adapter_revision)
        roles[f"the adapter {adapter.name}"] = adapter.folder
    remove_hidden_folders(file)
    check_file(file, roles)
    model_files(base.folder)  # refuses a base that cannot be compared, before the long work
    with hidden_folder(file) as out:
        folder_recipe = recipe.model_copy(update={"patch": None, "out": str(out)})
        try:
            report = run.merge(folder_recipe, progress=progress)
        except RoomError as error:
            raise RoomError(f"--patch {file} temporarily needs disk space for the merged model: {error}") from error
        return report, make_patch(base.folder, out, file, base_name=base.id, progress=progress)


@contextmanager
def hidden_folder(file: Path) -> Iterator[Path]:
    """Inside, the path of a new folder next to ``file``, so that it is on the same disk. It is in a locked folder of its own.

    Raises:
        RoomError, DiskError: it cannot be made, or not be removed.
    """
    parent = file.absolute().parent
    with ExitStack() as stack:
        stack.enter_context(disk_errors(parent))
        hidden = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=hidden_prefix(file), dir=parent)))
        stack.enter_context(locked(hidden))
        # The name becomes part of names in the output (the base of a residual adapter), so it is the patch's.
        merged = hidden / file.stem
        # Removed before the lock: by it, a later run knows what a killed one has left.
        stack.callback(shutil.rmtree, merged, ignore_errors=True)
        yield merged


def hidden_prefix(file: Path) -> str:
    """What the names of hidden folders for a patch begin with; eight more characters make them unique."""
    return f".{file.name}-"


def remove_hidden_folders(file: Path) -> None:
    """Remove the hidden folders that killed runs have left: those that this user owns and that no process has locked.

    Raises:
        DiskError: one cannot be removed.
    """
    parent = file.absolute().parent
    if not parent.is_dir():
        return
    name = re.compile(re.escape(hidden_prefix(file)) + "[a-z0-9_]{8}")
    with disk_errors(parent):
        for path in parent.iterdir():
            if not name.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
                continue
            # Folders with other files are the user's.
            found = {inner.name for inner in path.iterdir()}
            is_left = not found or (LOCK in found and found <= {LOCK, file.stem})
            # Where others may write, too, theirs stay.
            if is_left and path.stat().st_uid == os.geteuid():
                acquire_lock(path).release()  # an error, where another run is writing this patch
                shutil.rmtree(path)
