"""A merge that ends in a patch: the merged folder stands beside the patch while it is made, and is gone afterwards."""

from __future__ import annotations

import tempfile
from pathlib import Path

from qmerge import hub, run
from qmerge.adapters.reading.named import find
from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.patch.make import Summary, check_file, make_patch, model_files
from qmerge.progress import Progress
from qmerge.recipe import Recipe, make_recipe, read_recipe
from qmerge.safetensors_io.writer import write_file
from qmerge.schema import RECIPE_NAME, ReportData


def merge(recipe: Recipe, resume: bool, progress: Progress) -> tuple[ReportData, Summary | None]:
    """What the recipe asks for: a folder, or a patch.

    Raises:
        RecipeError, InputError, NumbersError, RoomError: see ``errors.py``.
    """
    if recipe.patch is None:
        return run.merge(recipe, resume, progress), None
    if resume:
        raise RecipeError(
            "--resume: a patch is made in one go, nothing of it is kept to go on from; start without --resume"
        )
    return merge_to_patch(recipe, Path(recipe.patch).expanduser(), progress)


def merge_to_patch(recipe: Recipe, file: Path, progress: Progress) -> tuple[ReportData, Summary]:
    """Merge into a folder beside ``file``, compare it with the base, write the patch, and remove the folder.

    Raises:
        as for ``merge``. Nothing is left behind by any error, nor by Ctrl-C.
    """
    base = hub.resolve(recipe.base, recipe.revision, CheckpointError)
    adapters = [find(name, recipe.adapter_revision) for name, _ in recipe.adapters]
    check_file(file, {"the base": base.folder, **{f"the adapter {a.name}": a.folder for a in adapters}})
    model_files(base.folder)  # what of it cannot be compared is said now, not when the work is done
    try:
        place = tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.absolute().parent)
    except OSError as cause:
        raise RecipeError(f"--patch {file}: {file.absolute().parent} cannot be written to: {cause.strerror}") from cause
    with place as folder:
        out = Path(folder) / file.stem
        try:
            report = run.merge(recipe.model_copy(update={"patch": None, "out": str(out)}), progress=progress)
        except RoomError as error:
            raise RoomError(
                f"--patch {file} takes the room of the merged model until it is written: {error}"
            ) from error
        name_patch(out / RECIPE_NAME, str(recipe.patch))
        return report, make_patch(base.folder, out, file, name=base.id, progress=progress)


def name_patch(path: Path, patch: str) -> None:
    """The recipe says what was asked for, not where the folder stood."""
    settings = {name: value for name, value in read_recipe(path).items() if name != "out"}
    write_file(path, make_recipe({**settings, "patch": patch}).to_yaml().encode())
