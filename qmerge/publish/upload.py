"""The upload of a finished folder: exactly the files that qmerge.json records, and the card with the model's id.

huggingface_hub uploads. An interrupted upload goes on with the same command: large files that are complete on the Hub's
side are not sent again.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import NAME as JOURNAL
from qmerge.errors import CheckpointError, StoppedError, listed
from qmerge.progress import Progress
from qmerge.publish.destination import Destination, check_destination, hub_errors
from qmerge.recipe import Recipe
from qmerge.report.limits import past_limits
from qmerge.report.loading import CARD_NAME, name_model
from qmerge.report.output_record import rewrite_file
from qmerge.schema import NAME, ReportData, read_report
from qmerge.wording import counted, size_text

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LARGEST_RECORD = 2**28
"""Bytes of a qmerge.json on the Hub that are downloaded to know which files an earlier push has left."""


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What was uploaded. ``url`` is the model's page; ``removed``: files of an earlier push, without a successor in this one."""

    id: str
    url: str
    files: list[str]
    bytes: int
    removed: list[str]

    def lines(self) -> list[str]:
        """The same in words."""
        lines = [f"Pushed to {self.url}: {counted(len(self.files), 'file')}, {size_text(self.bytes)}."]
        if self.removed:
            lines.append(f"Removed there, from an earlier push: {listed(self.removed)}")
        return lines


def push(out: Path, reference: str, *, private: bool | None, quiet: bool, progress: Progress) -> Pushed:
    """Upload a finished folder as a model. A repository that does not exist is created.

    Args:
        out: a folder that qmerge wrote.
        reference: ``owner/name``, or ``name`` for the user's own.
        private: whether a new repository is made private.
        quiet: show no progress of the upload.

    Raises:
        CheckpointError: the folder is not complete.
        RecipeError, HubError: see ``check_destination``; or the upload failed. The folder stays, and the same call goes on.
    """
    out = out.expanduser()
    # What is wrong with the folder is said before the Hub is asked.
    report = _complete_report(out)
    destination = check_destination(reference, private)
    if report.fidelity and report.fidelity.continuations:
        progress.warn(
            f"the report quotes {counted(len(report.fidelity.continuations), 'beginning')} of the text that the model was "
            "verified on, and is pushed with it; --continuations 0 in the merge leaves them out"
        )
    # A run that goes on in this folder would change files while they are read.
    with folder.locked(out):
        _name_in_card(out, str(report.recipe["target"]), destination.id)
        names = _recorded_files(report)
        return _upload(out, names, destination, quiet=quiet, progress=progress)


def push_merged(report: ReportData, recipe: Recipe, *, quiet: bool, progress: Progress) -> Pushed | None:
    """Upload the model that a run has just finished, if its recipe says so and it is past none of the recipe's limits.

    Returns:
        What was uploaded; None where nothing was.

    Raises:
        as ``push``.
    """
    if not recipe.push_to_hub:
        return None
    past = past_limits([report], min_kept=recipe.min_kept, max_kl_ratio=recipe.max_kl_ratio)
    if past:
        progress.warn(f"not pushed to {recipe.push_to_hub}: {'; '.join(past)}")
        return None
    pushed = push(Path(recipe.out or ""), recipe.push_to_hub, private=recipe.private, quiet=quiet, progress=progress)
    for line in pushed.lines():
        progress.note(line)
    return pushed


def _complete_report(out: Path) -> ReportData:
    """The record of a finished folder.

    Raises:
        CheckpointError: it has none, or a file that it names is missing, or its run was interrupted.
    """
    report = read_report(out)
    if (out / JOURNAL).exists():
        raise CheckpointError(f"{out} is not complete: repeat its merge with --resume, then push")
    missing = [name for name in _recorded_files(report) if not (out / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{out}: {listed(missing)} is missing. `qmerge verify {out}` lists everything that is wrong"
        )
    return report


def _recorded_files(report: ReportData) -> list[str]:
    """Names of all files that a folder records, and of the record itself."""
    return sorted({*(record.file for record in [*report.files, *report.outputs]), NAME})


def _name_in_card(out: Path, target: str, hub_id: str) -> None:
    """Write the id of the model into the commands of its card."""
    card = out / CARD_NAME
    if not card.is_file():
        return
    # The user may have edited the card, in any encoding: other bytes stay as they are.
    old = card.read_bytes()
    new = name_model(old.decode("utf-8", "surrogateescape"), out, target, hub_id).encode("utf-8", "surrogateescape")
    if new != old:
        rewrite_file(out, CARD_NAME, new)


def _upload(out: Path, names: list[str], destination: Destination, *, quiet: bool, progress: Progress) -> Pushed:
    from huggingface_hub import HfApi

    api = HfApi()
    hub_id = destination.id
    nbytes = sum((out / name).stat().st_size for name in names)
    advice = f". {out} is complete; go on with: qmerge push {out} {hub_id}"
    if destination.private:
        advice += " --private"
    progress.note(f"uploading {size_text(nbytes)} to {hub_id}")
    with hub_errors(f"{hub_id} could not be uploaded", advice), _interruptible(advice), _bars(quiet):
        url = str(api.create_repo(hub_id, private=destination.private, exist_ok=True))
        removed = _left_over(api, destination, names)
        api.upload_folder(
            repo_id=hub_id,
            folder_path=out,
            # As patterns they mean themselves only.
            allow_patterns=[glob.escape(name) for name in names],
            delete_patterns=[glob.escape(name) for name in removed] or None,
            commit_message="Upload a model merged by qmerge",
        )
    return Pushed(id=hub_id, url=url, files=names, bytes=nbytes, removed=removed)


def _left_over(api: HfApi, destination: Destination, names: list[str]) -> list[str]:
    """Files on the Hub that an earlier push wrote and this model does not have, such as shards of another number.

    Loaders would read them, too. Files that qmerge did not write stay.
    """
    if destination.files is None or NAME not in destination.files:
        return []
    # Somebody else may have written a file of this name, of any size.
    info = api.get_paths_info(destination.id, [NAME])
    if not info or getattr(info[0], "size", LARGEST_RECORD + 1) > LARGEST_RECORD:
        return []
    record = Path(api.hf_hub_download(destination.id, NAME))
    try:
        earlier = read_report(record.parent)
    except CheckpointError:  # of another version, or edited
        return []
    written = set(_recorded_files(earlier))
    return sorted(written & destination.files - set(names))


@contextmanager
def _interruptible(advice: str) -> Iterator[None]:
    """Ctrl-C in an upload becomes one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as cause:
        raise StoppedError(f"interrupted{advice}") from cause


@contextmanager
def _bars(quiet: bool) -> Iterator[None]:
    """Inside, the Hub's library shows its progress bars only on a terminal, and not where the user wants quiet."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    if quiet or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        if not were_disabled:
            enable_progress_bars()
