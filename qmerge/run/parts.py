"""One model written by several processes, on one machine or many: each merges its part, ``finalize`` completes the model.

A part writes whole output files, and a journal of its own that stays until the model is complete. Parts share nothing but
the output folder and the hashing of the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import NAME as JOURNAL
from qmerge.checkpoint.journal import Journal, JournalContent, first_difference, parts_begun, read_journal
from qmerge.checkpoint.parts import Part, name_of_part
from qmerge.errors import InputError, NumbersError, QmergeError, RecipeError, listed
from qmerge.pipeline import Outcome
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import Device, Recipe, make_recipe
from qmerge.report.environment import device_name
from qmerge.report.records import check_unchanged, input_records, input_states, joined_records
from qmerge.run.complete import add_fidelity, complete_model
from qmerge.run.merge_model import prepare, run_identity, write_weights
from qmerge.run.state import Run, Written
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import InputRecord, ReportData, read_report

DIFFERS_BETWEEN_PARTS = ("input",)
"""Keys of a run's identity: each part hashes other files."""

DIFFERS_IN_FINALIZE = ("input", "device")
"""The same for the process that completes the model: it computes no weight."""

MOST_LISTED = 20
"""Missing parts that an error line names."""


def merge_part(recipe: Recipe, part: Part, resume: bool = False, progress: Progress | None = None) -> list[str]:
    """Merge the weights of one part into the output folder.

    Args:
        resume: go on with this part if it was interrupted; start it if it was not begun.

    Returns:
        The names of the files that it wrote.

    Raises:
        RecipeError: the recipe cannot be done in parts, the folder holds something else, or this part was begun before.
        InputError, NumbersError, RoomError: as ``merge``. Nothing of this part is left behind except what --resume needs.
    """
    progress = progress or NoProgress()
    check_recipe_for_parts(recipe)
    if not resume:
        _check_not_complete(recipe, part)
    with Reader() as reader:
        run = prepare(recipe, reader, resume=resume, progress=progress, part=part)
        files = [shard.file for shard in run.shards]
        out_existed = run.out.exists()
        with folder.locked(run.out, part):
            try:
                _write_part(run, part, files, resume)
            except (NumbersError, InputError):
                folder.discard_part(run.out, part, files, made_by_us=not out_existed)
                raise
            finally:
                progress.end()
        return files


def check_recipe_for_parts(recipe: Recipe) -> None:
    """Check that a recipe asks for nothing that needs all weights in one process.

    Raises:
        RecipeError: it does. (Whether ``auto`` takes preserve is known later, when survival was predicted.)
    """
    reasons = {
        "patch": "it compares the whole model; make it afterwards with: qmerge patch BASE OUT --out FILE",
        "promote": "it measures the whole model first; leave it out, or merge in one process",
        "residual": "it is one file for all weights; leave it out, or merge in one process",
    }
    for name, reason in reasons.items():
        if getattr(recipe, name) is not None:
            raise RecipeError(f"--{name} cannot be done in parts (--shard, --workers ray): {reason}")


def _check_not_complete(recipe: Recipe, part: Part) -> None:
    """Check that this part is still to be written; whether it was begun is checked later.

    Raises:
        RecipeError: it is complete.
    """
    if recipe.out is None:
        return
    out = Path(recipe.out).expanduser()
    journal = out / name_of_part(JOURNAL, part)
    if journal.is_file() and _is_complete(out, read_journal(journal)):
        raise RecipeError(
            f"--shard {part}: this part is complete in {out}: run the parts that are missing, then qmerge finalize {out}; for "
            f"another recipe use another folder"
        )


def _write_part(run: Run, part: Part, files: list[str], resume: bool) -> None:
    before = input_states(run.plan.inputs)
    records = input_records(run.plan.inputs, run.progress, part.share)
    # What finalize needs to know, apart from the steps and files.
    facts = {
        "recipe": run.recipe.model_dump(),
        "device": device_name(run.context.device),
        "files": files,
        "records": [record.model_dump() for record in records],
    }
    journal = Journal(run.out, run_identity(run, records), resume, part, facts)
    write_weights(run, records, journal, resume=resume)
    check_unchanged(run.plan.inputs, before, records)


# --- the whole model -------------------------------------------------------------------------------------------------


def finalize(out: Path, progress: Progress | None = None) -> ReportData:
    """Complete a model whose parts are all written.

    Args:
        out: the output folder of the parts.

    Returns:
        The content of qmerge.json.

    Raises:
        RecipeError: a part is missing, unfinished or still being written, or the parts do not belong together. The folder
            stays as it is.
    """
    progress = progress or NoProgress()
    parts = _parts_in(out)
    with _locked(out, parts):
        begun = parts_begun(out)
        if len(begun) < parts[0].count:
            # They are removed last: an earlier call was interrupted when the model was complete, and judged.
            _remove_journals(out, begun)
            return read_report(out)
        contents = read_parts(out, parts)
        recipe = make_recipe({**contents[0].first["part"]["recipe"], "out": str(out)})
        with Reader() as reader:
            run = prepare_in_parts(recipe, reader, progress)
            return complete_from_parts(run, contents)


def prepare_in_parts(recipe: Recipe, reader: Reader, progress: Progress) -> Run:
    """Plan a run whose weights other processes merge. It needs no GPU, even where the recipe asks for one."""
    device: Device = recipe.device
    if device == "cuda" and not torch.cuda.is_available():
        device = "cpu"
    return prepare(recipe, reader, resume=False, progress=progress, in_parts=True, device=device)


def complete_from_parts(run: Run, contents: Sequence[JournalContent]) -> ReportData:
    """Write everything except the weights, which are there.

    Args:
        contents: the journals of all parts, in order; they belong together.

    Raises:
        RecipeError: the inputs are no longer those of the parts.
        QmergeError: the model cannot be judged. It is complete.
    """
    parts = _numbered(len(contents))
    try:
        report = complete_model(run, _written(run, contents))
        if run.recipe.verify:
            try:
                report = add_fidelity(report, run.recipe, run.plan, run.context, run.progress)
            except QmergeError:  # as in a merge: the model stays
                _remove_journals(run.out, parts)
                raise
        # Last, so that the same command goes on after an interruption.
        _remove_journals(run.out, parts)
        return report
    finally:
        run.progress.end()


def read_parts(out: Path, parts: Sequence[Part]) -> list[JournalContent]:
    """The journals of all parts.

    Raises:
        RecipeError: a part is not finished, or they do not belong together.
    """
    contents = [read_journal(out / name_of_part(JOURNAL, part)) for part in parts]
    unfinished = []
    for part, content in zip(parts, contents, strict=True):
        if not _is_complete(out, content):
            unfinished.append(part)
    if unfinished:
        raise RecipeError(f"{out}: {_to_run(unfinished, 'not finished', ' --resume')}")
    first = contents[0].first["run"]
    for part, content in zip(parts, contents, strict=True):
        difference = _difference(first, content.first["run"], DIFFERS_BETWEEN_PARTS)
        if difference:
            raise RecipeError(
                f"{out}: parts {parts[0]} and {part} do not belong together: {difference}; all parts need the same recipe, "
                f"versions and kind of device: start again in an empty folder"
            )
    return contents


def _is_complete(out: Path, content: JournalContent) -> bool:
    """Whether all files of a part are whole."""
    return bool(content.first) and all(_is_whole(out, file, content) for file in content.first["part"]["files"])


def _to_run(parts: Sequence[Part], state: str, more: str = "") -> str:
    """What is wrong with some parts, and how to write them, in words.

    Args:
        state: what they are, such as ``missing``.
        more: further options of the command.
    """
    if len(parts) == 1:
        return f"part {parts[0]} is {state}: run your merge command with --shard {parts[0]}{more}"
    names = listed([str(part) for part in parts], most=MOST_LISTED)
    return f"parts {names} are {state}: run your merge command for each, such as --shard {parts[0]}{more}"


def _is_whole(out: Path, file: str, content: JournalContent) -> bool:
    """Whether a file has its final name and the size that its journal says."""
    record = content.files.get(file)
    path = out / file
    return record is not None and path.is_file() and path.stat().st_size == record["bytes"]


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], ignored: Collection[str]) -> str | None:
    compared = []
    for identity in (one, other):
        compared.append({name: value for name, value in identity.items() if name not in ignored})
    return first_difference(compared[0], compared[1])


def _parts_in(out: Path) -> list[Part]:
    """All parts of the run in a folder; of a complete model, those whose journals or locks are still to be removed.

    Raises:
        RecipeError: some were not begun, or there are none.
    """
    is_complete = (out / "config.json").exists()
    begun = parts_begun(out) if out.is_dir() else []
    # Journals are removed before locks: an earlier call may have been interrupted between any two of them.
    if is_complete:
        begun = sorted({*begun, *parts_begun(out, folder.LOCK)}, key=lambda part: part.number)
    if not begun:
        raise RecipeError(
            f"{out} holds no run in parts; finalize is for a folder that runs with --shard i/n have written to"
        )
    counts = sorted({part.count for part in begun})
    if len(counts) > 1:
        raise RecipeError(
            f"{out} holds a run in {counts[0]} parts and one in {counts[1]}: all need the same number; start again in an "
            f"empty folder"
        )
    parts = _numbered(counts[0])
    missing = [part for part in parts if part not in begun]
    if missing and is_complete:  # their journals or locks were removed already
        return begun
    if missing:
        raise RecipeError(f"{out}: {_to_run(missing, 'missing')}")
    return parts


def _numbered(count: int) -> list[Part]:
    return [Part(number, count) for number in range(1, count + 1)]


@contextmanager
def _locked(out: Path, parts: Sequence[Part]) -> Iterator[None]:
    """Inside, no part can be written.

    Raises:
        RecipeError: one is being written.
    """
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(folder.locked(out, part))
        yield


def _written(run: Run, contents: Sequence[JournalContent]) -> Written:
    """What the parts' journals say about the weights.

    Raises:
        RecipeError: the inputs or versions are no longer those of the parts.
    """
    records = [[InputRecord.model_validate(record) for record in each.first["part"]["records"]] for each in contents]
    # The files that are quickly read are hashed again: a config or an adapter may have changed since.
    now = input_records(run.plan.inputs, run.progress, lambda sizes: ())
    joined = joined_records(run.plan.inputs, [*records, now])
    difference = _difference(contents[0].first["run"], run_identity(run, joined), DIFFERS_IN_FINALIZE)
    if difference:
        raise RecipeError(f"{run.out}: {difference} now; finalize needs the inputs and versions of the parts")
    files: dict[str, Mapping[str, Any]] = {}
    texts: dict[str, str] = {}
    steps: dict[str, dict[str, Any]] = {}
    for content in contents:
        for file in content.first["part"]["files"]:
            files[file] = {name: content.files[file][name] for name in ("bytes", "sha256")}
        for step in content.steps.values():
            texts.update(step["texts"])
        steps.update(content.steps)
    # In the order of the plan, as in a run that is not in parts: sums depend on their order.
    outcomes = {step.name: Outcome(**steps[step.name]["outcome"]) for step in run.plan.merged}
    devices = dict.fromkeys(content.first["part"]["device"] for content in contents)
    return Written(
        records=joined,
        device=" and ".join(devices),
        files=files,
        texts=texts,
        outcomes=outcomes,
        residuals={},
        fidelity=None,
    )


def _remove_journals(out: Path, parts: Sequence[Part]) -> None:
    for part in parts:
        (out / name_of_part(JOURNAL, part)).unlink()
