"""Merges, and what one would keep: the settings are the fields of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from qmerge import hub
from qmerge.progress import NoProgress, Progress
from qmerge.recipe import (
    AUTO_BASE,
    DEFAULT_TARGET,
    Device,
    EffortName,
    MergeOnto,
    Recipe,
    Scales,
    TrainedOn,
    make_recipe,
)
from qmerge.report.environment import check_environment
from qmerge.report.result import Report

PathLike = str | Path
"""A folder or file; where the argument says so, also an id on the Hub (``owner/name``)."""


@hub.one_commit_each()
def merge(
    *,
    adapter: PathLike | Sequence[PathLike],
    base: PathLike = AUTO_BASE,
    target: str,
    out: PathLike | None = None,
    patch: PathLike | None = None,
    max_size: str | None = None,
    combine: str = "linear",
    density: float = 1.0,
    revision: str | None = None,
    adapter_revision: str | None = None,
    allow_pickle: bool = False,
    rounding: str = "auto",
    effort: EffortName = "default",
    calibration: PathLike | None = None,
    calibration_tokens: int | None = None,
    sequence_length: int = 512,
    sequential: bool = True,
    merge_onto: MergeOnto = "dequantized",
    original: PathLike | None = None,
    original_revision: str | None = None,
    trained_on: TrainedOn | None = None,
    scales: Scales = "keep",
    block_size: int | None = None,
    double_quant: bool | None = None,
    quant_storage: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    checkpoint_format: str | None = None,
    residual: int | None = None,
    promote: str | None = None,
    verify: PathLike | None = None,
    continuations: int | None = None,
    min_kept: float | None = None,
    max_kl_ratio: float | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    seed: int = 0,
    device: Device = "auto",
    workers: int | Literal["ray"] = 1,
    max_memory: str | None = None,
    max_shard_size: str = "5GB",
    resume: bool = False,
    quiet: bool = False,
) -> Report:
    """Merge adapters into a base and write the model.

    Args:
        base: the model that the adapter was trained on: folder or Hub id; ``"auto"`` for the one that the adapter names.
        adapter: the adapter: training folder or Hub id, ``ID#NAME`` where it holds several. A list for several adapters, each
            with a weight if you like: ``["math=0.7", "chat=0.3"]``.
        target: format to store the model in: ``"nf4"``, ``"gptq"``, ``"int8"``, ``"bf16"``, … (``qmerge formats`` lists all),
            or ``"auto"`` for the best one that fits into ``max_size``.
        out: folder to write the model to; new or empty.
        patch: instead of ``out``, a file for the difference to the base (docs/patch.md).
        max_size: for target ``"auto"``, the largest size of the model's files, such as ``"6GB"``.
        combine: how several adapters become one: ``"linear"``, ``"ties"``, … (``qmerge formats`` lists all), or ``"chain"``
            to apply them one after the other.
        density: fraction of each delta's entries to keep when adapters are combined (TIES, DARE, …).
        revision: revision of the base on the Hub: branch, tag or commit.
        adapter_revision: revision of the adapter on the Hub.
        allow_pickle: read adapter_model.bin, a pickle, if the adapter has no safetensors file: tensors only, in another process.
        rounding: ``"nearest"``, ``"stochastic"``, ``"preserve"``, or ``"auto"``: preserve where nearest keeps too little.
        effort: how long ``preserve`` searches, and on how much text: ``"fast"``, ``"default"`` or ``"best"``.
        calibration: what ``preserve`` is calibrated on: a text or jsonl file, a data set on the Hub, ``"generate"``
            (text that the adapter model writes: the default), ``"general"`` (text that ships with qmerge), ``"random"`` or
            ``"none"``.
        calibration_tokens: number of tokens to calibrate on; None: 8192, 16384 or 32768, by ``effort``.
        sequence_length: tokens per sequence of the calibration text.
        sequential: calibrate each layer on the outputs of the rounded layers before it (better, slower).
        merge_onto: add the delta to the ``"dequantized"`` base, as in training, or to the ``"original"`` 16-bit model.
        original: the 16-bit model that a quantized base was made from: folder or Hub id.
        original_revision: revision of the original on the Hub.
        trained_on: how training quantized a 16-bit base on the fly: ``"nf4"``, ``"nf4-dq"`` (double quantization), ``"fp4"``,
            ``"fp4-dq"`` or ``"int8"``; ``"none"``: not. None: as the training folder says.
        scales: where the format stays the same, ``"keep"`` the base's scales or compute ``"fresh"`` ones.
        block_size: weights per block of NF4 or FP4; by default the base's, else 64.
        double_quant: whether the scales of NF4 or FP4 are quantized, too; by default as in the base, else no.
        quant_storage: dtype of the tensors that hold NF4 or FP4 codes; by default the base's, else ``"uint8"``.
        bits: bits per GPTQ weight: 2, 3, 4 or 8; by default the base's, else 4.
        group_size: inputs that share a scale: 32, 64, 128, or -1 for all; by default the base's, else 128.
        sym: whether integer levels are symmetric around zero; by default as in the base, else yes.
        act_order: whether GPTQ groups inputs by importance: a little better, but slower to run; by default no.
        static_groups: whether neighbouring inputs stay in one group in spite of ``act_order``; by default no.
        checkpoint_format: zeros of GPTQ as ``"gptq"`` (v1) or ``"gptq_v2"``; by default as in the base.
        residual: rank of an additional LoRA that compensates for the rounding error, written to ``out/residual``.
        promote: extra bytes, such as ``"100MB"``, for leaving the weights that keep least unquantized.
        verify: held-out text to compare the merged model with the unmerged one: a txt or jsonl file.
        continuations: how many beginnings of the ``verify`` text the report quotes, with what base, unmerged and merged model
            write after them; 0 keeps the text out of the report. None: 3, or 0 with ``push_to_hub``.
        min_kept: a model whose gain kept is less (where the whole model was not measured: the share of the delta) is not pushed
            to the Hub; on the command line, exit code 5 says so.
        max_kl_ratio: the same for a model whose KL ratio is larger.
        push_to_hub: id of a model on the Hub, ``"owner/name"``, to upload the finished model to, unless it is past a limit. The
            token comes from ``HF_TOKEN`` or ``hf auth login``; it is checked before the merge begins.
        private: make the model on the Hub private, if it is new there; None: as its owner's settings say.
        seed: seed of stochastic rounding, random calibration tokens and random combinations.
        device: where to compute: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        workers: number of weights that are worked on at once, or ``"ray"`` for one task per output file on a Ray cluster.
        max_memory: memory for the weights being worked on, which are cut into row blocks, and for calibration; None for 2 GB, and
            as much as is free for calibration.
        max_shard_size: largest size of one file of the model.
        resume: go on with an interrupted run in ``out``.
        quiet: show no progress; warnings are still shown.

    Returns:
        A ``Report``: ``report.verdict`` says in a word what became of the fine-tuning, where the whole model was measured.

    Raises:
        qmerge.errors.QmergeError: the message is one line, the class says what kind of problem it is. No unfinished file has
            its final name.
    """
    check_environment()
    settings = locals()

    from qmerge import publish
    from qmerge.patch import direct
    from qmerge.report.terminal.progress import TerminalProgress

    progress = TerminalProgress(quiet)
    recipe = _recipe(settings, progress)
    if recipe.push_to_hub:
        publish.check_destination(recipe.push_to_hub, recipe.private)
    data, _ = direct.merge(recipe, resume, progress)
    publish.push_merged(data, recipe, quiet=quiet, progress=progress)
    return Report(data)


@hub.one_commit_each()
def plan(
    *,
    adapter: PathLike | Sequence[PathLike],
    base: PathLike = AUTO_BASE,
    target: str | None = None,
    out: PathLike | None = None,
    patch: PathLike | None = None,
    max_size: str | None = None,
    combine: str = "linear",
    density: float = 1.0,
    revision: str | None = None,
    adapter_revision: str | None = None,
    allow_pickle: bool = False,
    rounding: str = "auto",
    effort: EffortName = "default",
    calibration: PathLike | None = None,
    calibration_tokens: int | None = None,
    sequence_length: int = 512,
    sequential: bool = True,
    merge_onto: MergeOnto = "dequantized",
    original: PathLike | None = None,
    original_revision: str | None = None,
    trained_on: TrainedOn | None = None,
    scales: Scales = "keep",
    block_size: int | None = None,
    double_quant: bool | None = None,
    quant_storage: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    checkpoint_format: str | None = None,
    residual: int | None = None,
    promote: str | None = None,
    verify: PathLike | None = None,
    continuations: int | None = None,
    min_kept: float | None = None,
    max_kl_ratio: float | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    seed: int = 0,
    device: Device = "auto",
    workers: int | Literal["ray"] = 1,
    max_memory: str | None = None,
    max_shard_size: str = "5GB",
    served_with: str | None = None,
) -> dict[str, Any]:
    """Predict what a merge would keep, and how much disk and memory it needs. Nothing is written.

    It reads headers, the adapter, and a few rows of some adapted weights.

    Args:
        target: as for ``merge``. Without it, the targets are compared, but no weights listed.
        served_with: the program that will serve the model (``"vllm"``, ``"ollama"``, ``"mlx"``, ``"colab"``, …): compare the
            targets that it loads, and name the best one (``"serve"``).

    All other arguments are those of ``merge``.

    Returns:
        What ``qmerge plan --json`` prints: ``"targets"`` (size and predicted share kept of each target), ``"warnings"``, and
        with a target also ``"weights"``, ``"actions"``, bytes and memory.

    Raises:
        qmerge.errors.QmergeError: the merge is not possible.
    """
    check_environment()
    settings = locals()

    from qmerge.report.describe.plan import describe_plan

    return describe_plan(_recipe(settings, NoProgress()), target_given=target is not None, served_with=served_with)


@hub.one_commit_each()
def measure(
    *,
    adapter: PathLike | Sequence[PathLike],
    base: PathLike = AUTO_BASE,
    target: str | None = None,
    targets: Sequence[str] | None = None,
    out: PathLike | None = None,
    patch: PathLike | None = None,
    max_size: str | None = None,
    combine: str = "linear",
    density: float = 1.0,
    revision: str | None = None,
    adapter_revision: str | None = None,
    allow_pickle: bool = False,
    rounding: str = "auto",
    effort: EffortName = "default",
    calibration: PathLike | None = None,
    calibration_tokens: int | None = None,
    sequence_length: int = 512,
    sequential: bool = True,
    merge_onto: MergeOnto = "dequantized",
    original: PathLike | None = None,
    original_revision: str | None = None,
    trained_on: TrainedOn | None = None,
    scales: Scales = "keep",
    block_size: int | None = None,
    double_quant: bool | None = None,
    quant_storage: str | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    sym: bool | None = None,
    act_order: bool | None = None,
    static_groups: bool | None = None,
    checkpoint_format: str | None = None,
    residual: int | None = None,
    promote: str | None = None,
    verify: PathLike | None = None,
    continuations: int | None = None,
    min_kept: float | None = None,
    max_kl_ratio: float | None = None,
    push_to_hub: str | None = None,
    private: bool | None = None,
    seed: int = 0,
    device: Device = "auto",
    workers: int | Literal["ray"] = 1,
    max_memory: str | None = None,
    max_shard_size: str = "5GB",
    quiet: bool = False,
) -> list[Report]:
    """Do the whole merge without writing the model, and report what is kept, for one or several targets.

    Args:
        target: format to measure; ``"nf4"`` by default.
        targets: several formats to measure, instead of ``target``.

    All other arguments are those of ``merge``, so that the settings of a merge can be passed on. ``out``, ``patch``,
    ``max_shard_size``, ``residual``, ``promote`` and ``push_to_hub`` have no effect. With ``verify``, each model is written to a
    temporary folder, compared with the unmerged model, and deleted.

    Returns:
        One ``Report`` for each target.

    Raises:
        qmerge.errors.QmergeError: the merge is not possible.
    """
    check_environment()
    if isinstance(targets, str):  # one name: a string is a sequence of letters, too
        targets = [targets]
    names = list(targets or [target or DEFAULT_TARGET])
    settings = locals()

    from qmerge import run
    from qmerge.report.terminal.progress import TerminalProgress

    run.check_targets(names)
    progress = TerminalProgress(quiet)
    recipe = _recipe({**settings, "target": names[0]}, progress)

    return [Report(data) for data in run.measure(recipe, names, progress)]


def _recipe(arguments: dict[str, Any], progress: Progress) -> Recipe:
    """The arguments of a function, ``locals()`` at its start, as a checked recipe, with the base that the adapter names."""
    settings = {name: value for name, value in arguments.items() if name in Recipe.model_fields}
    if settings["target"] is None:
        settings["target"] = DEFAULT_TARGET
    recipe = make_recipe(settings)

    from qmerge.base_check.from_training import with_named_base

    return with_named_base(recipe, progress.note)
