"""How close a merged model is to the unmerged adapter model, on text that neither was trained on.

    gain kept  (loss(base) − loss(merged)) / (loss(base) − loss(unmerged))      1: all of the gain, 0: none
    KL ratio   KL(unmerged ‖ merged) / KL(unmerged ‖ base)                      0: equal outputs, 1: as far off as the base

The same text runs through base, unmerged and merged model in lockstep, with one decoder layer of one of them in memory, so
this needs no more memory than the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.scores import Scores, finish_run, score_runs
from qmerge.calibration.tasks import CAUSAL_LM, task_of
from qmerge.calibration.unmerged import unmerged_model
from qmerge.checkpoint.scan import Checkpoint
from qmerge.evaluation.continuations import continue_texts
from qmerge.evaluation.inputs import inputs_of_folder, located_recipe
from qmerge.evaluation.llama_cpp import next_token_logprobs
from qmerge.evaluation.stored import layered_stored_model, logits_layer_by_layer
from qmerge.evaluation.whole_fidelity import whole_fidelity
from qmerge.gguf.base import GgufCheckpoint, open_model
from qmerge.planning.plan import Plan, make_plan
from qmerge.progress import Progress, announced
from qmerge.recipe import OPTIONS, Recipe, make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import FidelityRecord, read_report
from qmerge.weights.context import RunContext, compute_device

LLAMA_CPP_TOKENS = 128
"""Tokens of the text that llama.cpp predicts: each takes a request that returns the whole vocabulary."""


def _report_to_nobody(_: str) -> None:
    pass


def fidelity_of_folder(
    folder: Path,
    text: Path,
    *,
    against: tuple[str, str] | None,
    tokens: int,
    length: int,
    device: str,
    progress: Progress,
) -> FidelityRecord:
    """Fidelity of the model in a folder.

    Args:
        folder: a merged model; one that qmerge did not write needs ``against``.
        text: held-out text, plain or JSON lines.
        against: base and adapter to compare with; None for those of the recipe in the folder.
        tokens: of the text, in sequences of ``length`` tokens.
        device: auto, cpu or cuda.

    Raises:
        QmergeError: as ``fidelity``; CheckpointError where the folder has no qmerge.json and ``against`` is None.
    """
    recipe = _recipe_of_folder(folder, against, device)
    try:
        progress.stage("measuring fidelity", 1)
        if against is None:
            with Reader() as reader:
                option = "name base and adapter with --against BASE ADAPTER, "
                inputs_of_folder(recipe, read_report(folder), reader, hashed=False, option=option)
        return fidelity(
            folder,
            recipe,
            text,
            device=compute_device(device),
            tokens=tokens,
            length=length,
            report_progress=lambda line: progress.advance(0, line),
        )
    finally:
        progress.end()


def _recipe_of_folder(folder: Path, against: tuple[str, str] | None, device: str) -> Recipe:
    if against is None:
        return located_recipe(read_report(folder), folder, device=device)
    settings: dict[str, Any] = {"target": "fp32"}  # of another tool: any target will do, nothing is written
    if (folder / REPORT_NAME).is_file():
        settings = read_report(folder).recipe
    base, adapter = against
    # Revisions in the recipe belong to other ids.
    changes = {"base": base, "adapter": adapter, "revision": None, "adapter_revision": None, "device": device}
    return make_recipe({**settings, **changes})


def fidelity(
    merged: Path,
    recipe: Recipe,
    text: Path,
    *,
    device: torch.device,
    tokens: int | None = None,
    length: int = 512,
    continuations: int = 0,
    report_progress: Callable[[str], None] = _report_to_nobody,
) -> FidelityRecord:
    """Fidelity of the model in the folder ``merged``.

    Args:
        recipe: names the base and the adapter, and how the base was quantized in training.
        text: held-out text, plain or JSON lines.
        tokens: how many tokens of it (None: all), in sequences of ``length`` tokens.
        continuations: how many beginnings of the text the three models go on with, where they predict the next token.
        report_progress: called with one line per decoder layer.

    Raises:
        RecipeError, CheckpointError, AdapterError: an input cannot be read, or transformers cannot run the model.
    """
    with Reader() as reader:
        plan = _plan_of(recipe, merged, reader)
        context = RunContext(reader, device, 0, plan.block_entries)
        task = task_of(plan.config)
        if task is not CAUSAL_LM:
            return whole_fidelity(
                plan,
                _open_merged(merged, plan, reader),
                context,
                text,
                task,
                tokens=tokens,
                length=length,
                report_progress=report_progress,
            )
        batches = texts.token_batches(
            text,
            plan.inputs.tokenizer_folder,
            tokens=tokens,
            length=min(length, texts.max_sequence_length(plan.config)),
            vocab_size=texts.vocab_size(plan.config),
        )
        scores = _score_models(plan, merged, context, batches, report_progress=report_progress)
        continued = []
        if continuations:
            stored = _open_merged(merged, plan, reader)
            continued = continue_texts(
                plan, stored, context, batches, count=continuations, report_progress=report_progress
            )
    token_count = sum(batch.numel() for batch in batches)
    record = scores.record(text.name, tokens=token_count, length=batches[0].shape[1])
    return record.model_copy(update={"continuations": continued})


def _plan_of(recipe: Recipe, merged: Path, reader: Reader) -> Plan:
    """A plan for the values of base and adapter: none of its steps is done. The merged model may bring the tokenizer."""
    plan = make_plan(_without_target_options(recipe), reader)
    return replace(plan, inputs=replace(plan.inputs, other_tokenizer=merged))


def _open_merged(folder: Path, plan: Plan, reader: Reader) -> Checkpoint:
    """The merged model, which has the names of its base (or of its original, where both are GGUF files)."""
    like: Checkpoint | None = plan.inputs.base
    if isinstance(like, GgufCheckpoint):
        like = plan.inputs.original
    return open_model(folder, reader, like)


def _without_target_options(recipe: Recipe) -> Recipe:
    """The recipe without everything that concerns the target: a plan for the unmerged adapter model."""
    changes: dict[str, Any] = {
        "target": "fp32",
        "merge_onto": "dequantized",
        "original": None,
        "original_revision": None,
        "scales": "keep",
        "rounding": "nearest",
        "calibration": None,
    }
    return recipe.model_copy(update={**changes, **dict.fromkeys(OPTIONS)})


def _score_models(
    plan: Plan,
    merged: Path,
    context: RunContext,
    batches: Sequence[Tensor],
    *,
    report_progress: Callable[[str], None],
) -> Scores:
    """Run all batches through base, unmerged and merged model, layer by layer."""
    base_model, base_values = unmerged_model(plan, context, with_delta=False)
    adapter_model, adapter_values = unmerged_model(plan, context)
    # A merged model's config.json may name a quantizer; the plan's is that of a dense model of the same architecture.
    stored = _open_merged(merged, plan, context.reader)
    merged_model, merged_values = layered_stored_model(stored, plan.config, context.reader, context.device)
    runs = [
        LayerwiseRun(base_model, base_values, batches),
        LayerwiseRun(adapter_model, adapter_values, batches),
        LayerwiseRun(merged_model, merged_values, batches),
    ]
    last = len(base_model) - 1
    with stopping(runs):
        for run in runs:
            run.start()
        finished = []
        for index in announced(range(len(base_model)), "measuring fidelity: layer", report_progress):
            for run in runs:
                if index < last:
                    run.run_layer(index)
                    continue
                with run.model.loaded(last, run.values):
                    finished.append(finish_run(run))
    report_progress("measuring fidelity: comparing predictions")
    base, unmerged, merged_run = finished
    return score_runs(base, unmerged, merged_run, batches)


def llama_cpp_fidelity(file: Path, text: Path, against: tuple[str, str] | None) -> FidelityRecord:
    """Fidelity of a GGUF file as llama.cpp itself runs it, on the first tokens of a text.

    Base and unmerged model are computed in float32, as ``fidelity`` does.

    Args:
        file: in a folder that qmerge wrote.
        against: base and adapter to compare with; None for those of the recipe in the folder.

    Raises:
        QmergeError: as ``fidelity``; CheckpointError where llama.cpp does not load the file.
    """
    recipe = _recipe_of_folder(file.parent, against, "cpu")
    with Reader() as reader:
        plan = _plan_of(recipe, file.parent, reader)
        vocab_size = texts.vocab_size(plan.config)
        (ids_1L, *_) = texts.token_batches(
            text, plan.inputs.tokenizer_folder, tokens=LLAMA_CPP_TOKENS, length=LLAMA_CPP_TOKENS, vocab_size=vocab_size
        )
        context = RunContext(reader, torch.device("cpu"), 0, plan.block_entries)
        base_LV = logits_layer_by_layer(*unmerged_model(plan, context, with_delta=False), ids_1L)[0, :-1]
        unmerged_LV = logits_layer_by_layer(*unmerged_model(plan, context), ids_1L)[0, :-1]
    ids = ids_1L[0].tolist()
    merged_LV = next_token_logprobs(file, [ids[:length] for length in range(1, len(ids))], base_LV.shape[-1])
    scores = Scores()
    scores.add(ids_1L[0, 1:], base=base_LV, unmerged=unmerged_LV, merged=merged_LV)
    return scores.record(text.name, tokens=len(base_LV), length=len(ids))
