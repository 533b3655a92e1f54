"""What is there already: adapters, models, and folders that qmerge wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qmerge.api.merging import PathLike
from qmerge.recipe import JUDGED_TOKENS, Device
from qmerge.report.environment import check_environment
from qmerge.report.result import Checks
from qmerge.schema import FidelityRecord


def inspect(
    adapter: PathLike,
    *,
    revision: str | None = None,
    base: PathLike | None = None,
    base_revision: str | None = None,
) -> dict[str, Any]:
    """Describe an adapter: its kind, ranks, scales and sizes, what it was trained on, and what looks wrong.

    A model is described, too: how it is stored, its fingerprint, and what it was merged from.

    Args:
        adapter: the adapter or model: folder or Hub id, ``ID#NAME`` where it holds several adapters.
        revision: its revision on the Hub: branch, tag or commit.
        base: a model to compare the adapter with: folder or Hub id. Was the adapter trained on it?
        base_revision: revision of that model on the Hub.

    Returns:
        What ``qmerge inspect --json`` prints. ``"problem"`` says why an adapter cannot be merged; None if it can.

    Raises:
        qmerge.errors.QmergeError: the folder holds neither an adapter nor a model.
    """
    check_environment()

    from qmerge.report.describe.inspect import inspect as describe

    return describe(str(adapter), revision, None if base is None else str(base), base_revision)


def verify(out: PathLike, *, reload: bool = True, loader: str | None = None, against_inputs: bool = False) -> Checks:
    """Check a folder that qmerge wrote: hashes, headers and index, and whether a stock loader loads the model.

    ``fidelity`` compares the model with the unmerged one.

    Args:
        out: the folder.
        reload: also load the model, with nothing missing and nothing left over, and run it.
        loader: what to load it with: ``"transformers"``, ``"llama.cpp"``, ``"gptqmodel"``, ``"auto-gptq"`` or ``"mlx"``. None: mlx
            for an MLX folder, llama.cpp for a GGUF file where xllamacpp is installed, transformers for all others.
        against_inputs: compute all weights again from base and adapter and compare their bytes; else one weight of each file,
            where base and adapter are at hand.

    Returns:
        The checks, as a list; ``.ok`` is True if all of them passed.

    Raises:
        qmerge.errors.QmergeError: qmerge did not write the folder, or the loader is not installed.
    """
    check_environment()

    from qmerge.evaluation.verify import verify as verify_folder

    return Checks(verify_folder(Path(out).expanduser(), reload, loader, against_inputs=against_inputs))


def fidelity(
    *,
    out: PathLike,
    text: PathLike,
    against: tuple[PathLike, PathLike] | None = None,
    tokens: int = JUDGED_TOKENS,
    sequence_length: int = 512,
    device: Device = "auto",
    quiet: bool = False,
) -> FidelityRecord:
    """Compare a merged model with its base and the unmerged adapter model, on held-out text.

    Args:
        out: the merged model.
        text: a txt or jsonl file that was used for neither training nor calibration.
        against: base and adapter to compare with; by default those of the recipe in ``out``.
        tokens: number of tokens of the text to use.
        sequence_length: tokens per sequence.
        device: where to compute: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        quiet: show no progress.

    Returns:
        ``verdict`` (kept, mostly kept, damaged or lost), losses of the three models, ``gain_kept`` (1: the adapter's whole
        improvement of the loss was kept), ``kl_ratio`` (0: predicts like the unmerged model, 1: like the base), and how often
        the most likely token is the same.

    Raises:
        qmerge.errors.QmergeError: the folder or the text cannot be used.
    """
    check_environment()

    from qmerge.evaluation.fidelity import fidelity_of_folder
    from qmerge.report.terminal.progress import TerminalProgress

    return fidelity_of_folder(
        Path(out).expanduser(),
        Path(text).expanduser(),
        against=(str(against[0]), str(against[1])) if against else None,
        tokens=tokens,
        length=sequence_length,
        device=device,
        progress=TerminalProgress(quiet),
    )


def push(out: PathLike, hub_id: str, *, private: bool | None = None, quiet: bool = False) -> str:
    """Upload a folder that qmerge wrote to the Hub. An interrupted upload goes on with the same call.

    Args:
        out: the folder.
        hub_id: id of the model on the Hub: ``"owner/name"``, or ``"name"`` for your own. The token comes from ``HF_TOKEN`` or from
            ``hf auth login``.
        private: make the model private, if it is new there; None: as its owner's settings say.
        quiet: show no progress.

    Returns:
        The address of the model's page.

    Raises:
        qmerge.errors.QmergeError: the folder is not complete, or the Hub refuses it.
    """
    from qmerge import publish
    from qmerge.report.terminal.progress import TerminalProgress

    return publish.push(Path(out), hub_id, private=private, quiet=quiet, progress=TerminalProgress(quiet)).url
