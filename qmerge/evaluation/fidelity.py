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
from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.unmerged import unmerged_model
from qmerge.checkpoint.scan import scan
from qmerge.planning.plan import Plan, make_plan
from qmerge.progress import Progress
from qmerge.recipe import OPTIONS, Recipe, make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME as REPORT_NAME
from qmerge.schema import FidelityRecord, read_report
from qmerge.weights.context import RunContext, compute_device
from qmerge.weights.values import dense_values

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
    recipe = _recipe_of_folder(folder, against, device)
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


def _recipe_of_folder(folder: Path, against: tuple[str, str] | None, device: str) -> Recipe:
    if against is not None and not (folder / REPORT_NAME).is_file():
        settings: dict[str, Any] = {"target": "fp32"}  # of another tool: any target will do, nothing is written
    else:
        settings = read_report(folder).recipe
    if against:
        base, adapter = against
        # Revisions in the recipe belong to other ids.
        settings = {**settings, "base": base, "adapter": adapter, "revision": None, "adapter_revision": None}
    return make_recipe({**settings, "device": device})


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
        # The plan gives the values of base and adapter; none of its steps is done.
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
    base_model, base_values = unmerged_model(plan, context, with_delta=False)
    adapter_model, adapter_values = unmerged_model(plan, context)
    # A merged model's config.json may name a quantizer; the plan's is that of a dense model of the same architecture.
    merged_model, merged_values = _stored_model(merged, plan.config, context.reader, context.device)
    base = LayerwiseRun(base_model, base_values, batches, with_head=True)
    unmerged = LayerwiseRun(adapter_model, adapter_values, batches, with_head=True)
    merged_run = LayerwiseRun(merged_model, merged_values, batches, with_head=True)
    runs = [base, unmerged, merged_run]
    with stopping(runs):
        for run in runs:
            run.start()
        for index in range(len(base_model)):
            report_progress(f"measuring fidelity: layer {index + 1} of {len(base_model)}")
            for run in runs:
                run.run_layer(index)
        # The three heads are in memory at once, so that no logits need to be kept.
        for run in runs:
            run.model.load(None, run.model.names(None), run.values)
        scores = Scores()
        for batch, ids in enumerate(batches):
            scores.add(
                ids.to(context.device),
                base=base.logits(batch),
                unmerged=unmerged.logits(batch),
                merged=merged_run.logits(batch),
            )
        return scores


def _stored_model(
    folder: Path, config: dict[str, Any] | None, reader: Reader, device: torch.device
) -> tuple[LayeredModel, Values]:
    """A model without weights, and the stored values of a folder to load into it.

    Args:
        config: of the model; None for the folder's own.
    """
    checkpoint = scan(folder, reader)
    weights = {name: weight for name, weight in checkpoint.weights.items() if weight.format != "raw"}
    model = LayeredModel(config or checkpoint.config, weights, device)

    def values(name: str) -> Tensor:
        return dense_values(weights[name], reader, device, model.is_conv1d(name))

    return model, values


def logits_of_folder(folder: Path, ids_NL: Tensor) -> Tensor:
    """float32 logits [N, L, V] of the stored values of a folder, by transformers' own code, layer by layer.

    Args:
        ids_NL: token ids, int64 [N, L].
    """
    with Reader() as reader:
        model, values = _stored_model(folder, None, reader, ids_NL.device)
        run = LayerwiseRun(model, values, [ids_NL], with_head=True)
        with stopping([run]):
            run.start()
            for index in range(len(model)):
                run.run_layer(index)
            with model.loaded(None, values), torch.inference_mode():
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
        # −1: the token after the last one of a sequence is not known.
        no_token = torch.full_like(ids_NL[:, :1], -1)
        next_ids = torch.cat([ids_NL[:, 1:], no_token], dim=1).flatten()
        for start in range(0, len(next_ids), POSITIONS):
            positions = slice(start, start + POSITIONS)
            self._add_positions(
                next_ids[positions],
                base=_log_probabilities(base, positions),
                unmerged=_log_probabilities(unmerged, positions),
                merged=_log_probabilities(merged, positions),
            )

    def _add_positions(self, next_ids: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        """next_ids: int64 [positions]; log-probabilities: float32 [positions, V]."""
        known = next_ids >= 0
        target = next_ids.clamp(min=0)[:, None]
        for model, log_probabilities in enumerate((base, unmerged, merged)):
            self.losses[model] -= log_probabilities.gather(-1, target)[known].double().sum().cpu()
        self.predicted += int(known.sum())
        self.divergences.append(torch.stack([kl_divergence(unmerged, base), kl_divergence(unmerged, merged)]).cpu())
        self.agreed += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())

    def record(self, text: str, *, tokens: int, length: int) -> FidelityRecord:
        """The means, as qmerge.json has them.

        Args:
            text: name of the text's file.
            tokens, length: of the whole text, and of one sequence.
        """
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
            # An adapter that does not lower the loss on this text has no gain to keep.
            gain_kept=(base - merged) / (base - unmerged) if base > unmerged else None,
            kl_base=kl_base,
            kl_merged=kl_merged,
            # Equal outputs: an adapter without effect.
            kl_ratio=kl_merged / kl_base if kl_base > 0 else None,
            top1_agreement=self.agreed / tokens,
            kl_p99=float(to_merged.quantile(0.99)),
        )


def _log_probabilities(logits_NLV: Tensor, positions: slice) -> Tensor:
    """float32 [positions, V] of some positions, counted through all sequences."""
    return torch.log_softmax(logits_NLV.flatten(0, 1)[positions].float(), -1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of every position, from log-probabilities [positions, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
