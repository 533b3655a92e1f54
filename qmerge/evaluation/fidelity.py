"""How close a merged model is to the unmerged adapter model, on text that neither was trained on.

    gain kept  (loss(base) − loss(merged)) / (loss(base) − loss(unmerged))      1: all of the gain, 0: none
    KL ratio   KL(unmerged ‖ merged) / KL(unmerged ‖ base)                      0: equal outputs, 1: as far off as the base

The same text runs through base, unmerged and merged model in lockstep, with one decoder layer of one of them in memory, so
this needs no more memory than the merge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.checkpoint.scan import scan
from qmerge.planning.plan import Plan, make_plan
from qmerge.progress import Progress
from qmerge.recipe import OPTIONS, Recipe, make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import FidelityRecord, read_report
from qmerge.types import Weight
from qmerge.weights.context import RunContext, compute_device
from qmerge.weights.values import dense_values, unmerged_values

POSITIONS = 256
"""Token positions whose probabilities over the vocabulary are worked on at once."""


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
    if against is not None and not (folder / REPORT_NAME).is_file():
        settings: dict[str, Any] = {"target": "fp32"}
    else:
        settings = read_report(folder).recipe
    if against:
        base, adapter = against
        settings = {**settings, "base": base, "adapter": adapter, "revision": None, "adapter_revision": None}
    recipe = make_recipe({**settings, "device": device})
    try:
        progress.stage("measuring fidelity", 1)
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


def fidelity(
    merged: Path,
    recipe: Recipe,
    text: Path,
    *,
    device: torch.device,
    tokens: int | None = None,
    length: int = 512,
    report_progress: Callable[[str], None] = _report_to_nobody,
) -> FidelityRecord:
    """Fidelity of the model in the folder ``merged``.

    Args:
        recipe: names the base and the adapter, and how the base was quantized in training.
        text: held-out text, plain or JSON lines.
        tokens: how many tokens of it (None: all), in sequences of ``length`` tokens.
        report_progress: called with one line per decoder layer.

    Raises:
        RecipeError, CheckpointError, AdapterError: an input cannot be read, or transformers cannot run the model.
    """
    with Reader() as reader:
        plan = make_plan(_without_target_options(recipe), reader)
        batches = texts.token_batches(
            text,
            plan.inputs.tokenizer_folder,
            tokens=tokens,
            length=min(length, texts.max_sequence_length(plan.config)),
            vocab_size=texts.vocab_size(plan.config),
        )
        context = RunContext(reader, device, 0, plan.block_entries)
        scores = _score_models(plan, merged, context, batches, report_progress=report_progress)
    token_count = sum(batch.numel() for batch in batches)
    return scores.record(text.name, tokens=token_count, length=batches[0].shape[1])


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
    """Run all batches through base, unmerged and merged model, layer by layer; logits exist for one batch at a time."""
    runs = [
        _base_run(plan, context, batches, with_delta=False),
        _base_run(plan, context, batches, with_delta=True),
        _merged_run(plan, merged, context, batches),
    ]
    with stopping(runs):
        for run in runs:
            run.start()
        layer_count = len(runs[0].model)
        for index in range(layer_count):
            report_progress(f"measuring fidelity: layer {index + 1} of {layer_count}")
            for run in runs:
                run.run_layer(index)
        for run in runs:  # the three heads are in memory at once, for logits of the same batch
            run.model.load(None, run.model.names(None), run.values)
        scores = Scores()
        for batch, ids in enumerate(batches):
            base, unmerged, merged_logits = (run.logits(batch) for run in runs)
            scores.add(ids.to(context.device), base=base, unmerged=unmerged, merged=merged_logits)
        return scores


def _base_run(plan: Plan, context: RunContext, batches: Sequence[Tensor], *, with_delta: bool) -> LayerwiseRun:
    """The base; with the delta, the unmerged adapter model."""
    steps = {step.name: step for step in plan.steps if step.weight.format != "raw"}
    model = LayeredModel(plan.config, steps, context.device)

    def values(name: str) -> Tensor:
        return unmerged_values(steps[name], context, model.is_conv1d(name), with_delta)

    return LayerwiseRun(model, values, batches, with_head=True)


def _merged_run(plan: Plan, folder: Path, context: RunContext, batches: Sequence[Tensor]) -> LayerwiseRun:
    """The stored values of a folder, in the architecture of the plan (``config.json`` of a merged model names its target)."""
    weights = {name: weight for name, weight in scan(folder, context.reader).weights.items() if weight.format != "raw"}
    model = LayeredModel(plan.config, weights, context.device)
    return _stored_values_run(model, weights, batches, context.reader)


def _stored_values_run(
    model: LayeredModel, weights: dict[str, Weight], batches: Sequence[Tensor], reader: Reader
) -> LayerwiseRun:
    def values(name: str) -> Tensor:
        return dense_values(weights[name], reader, model.device, model.is_conv1d(name))

    return LayerwiseRun(model, values, batches, with_head=True)


def logits_of_folder(folder: Path, ids_NL: Tensor) -> Tensor:
    """float32 logits [N, L, V] of the stored values of a folder, by transformers' own code, layer by layer.

    Args:
        ids_NL: token ids, int64 [N, L].
    """
    with Reader() as reader:
        checkpoint = scan(folder, reader)
        weights = {name: weight for name, weight in checkpoint.weights.items() if weight.format != "raw"}
        model = LayeredModel(checkpoint.config, weights, ids_NL.device)
        run = _stored_values_run(model, weights, [ids_NL], reader)
        with stopping([run]):
            run.start()
            for index in range(len(model)):
                run.run_layer(index)
            with model.loaded(None, run.values), torch.inference_mode():
                return run.logits(0).float()


@dataclass
class Scores:
    """Sums over tokens, in float64. All positions predict a token; the loss of the last one is unknown.

    losses       sums of the cross entropy, [3]: base, unmerged, merged
    predicted    number of positions with a loss
    divergences  per part of a batch, float32 [2, positions]: KL(unmerged ‖ base) and KL(unmerged ‖ merged)
    agreed       positions where unmerged and merged model have the same likeliest token
    """

    losses: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    predicted: int = 0
    divergences: list[Tensor] = field(default_factory=list)
    agreed: int = 0

    def add(self, ids_NL: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        """Add the logits [N, L, V] of the three models for a batch of token ids [N, L]."""
        no_token = torch.full_like(ids_NL[:, :1], -1)
        next_ids = torch.cat([ids_NL[:, 1:], no_token], dim=1).flatten()
        logits_of_models = [logits.flatten(0, 1) for logits in (base, unmerged, merged)]
        for start in range(0, len(next_ids), POSITIONS):
            positions = slice(start, start + POSITIONS)
            self._add_positions(next_ids[positions], [logits[positions] for logits in logits_of_models])

    def _add_positions(self, next_ids: Tensor, logits_of_models: Sequence[Tensor]) -> None:
        """next_ids: int64 [positions], −1 where the next token is unknown; logits: [positions, V] per model."""
        logs = [torch.log_softmax(logits.float(), -1) for logits in logits_of_models]
        known = next_ids >= 0
        target = next_ids.clamp(min=0)[:, None]
        for model, log in enumerate(logs):
            self.losses[model] -= log.gather(-1, target)[known].double().sum().cpu()
        base, unmerged, merged = logs
        self.predicted += int(known.sum())
        self.divergences.append(torch.stack([kl_divergence(unmerged, base), kl_divergence(unmerged, merged)]).cpu())
        self.agreed += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())

    def record(self, text: str, *, tokens: int, length: int) -> FidelityRecord:
        """The means, as qmerge.json has them."""
        base, unmerged, merged = (self.losses / self.predicted).tolist()
        to_base, to_merged = torch.cat(self.divergences, dim=1).double()
        kl_base = float(to_base.mean())
        kl_merged = float(to_merged.mean())
        return FidelityRecord(
            text=text,
            tokens=tokens,
            sequence_length=length,
            loss_base=base,
            loss_unmerged=unmerged,
            loss_merged=merged,
            gain_kept=(base - merged) / (base - unmerged) if base > unmerged else None,
            kl_base=kl_base,
            kl_merged=kl_merged,
            kl_ratio=kl_merged / kl_base if kl_base > 0 else None,
            top1_agreement=self.agreed / tokens,
            kl_p99=float(to_merged.quantile(0.99)),
        )


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of every position, from log-probabilities [positions, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
