"""Judges a whole merged model: base, unmerged adapter model and merged model side by side on held-out text.

    gain kept  (loss(base) − loss(merged)) / (loss(base) − loss(unmerged))      1 is all, 0 is the base
    KL ratio   KL(unmerged ‖ merged) / KL(unmerged ‖ base)                      0 is all, 1 is the base

Three streams of the same text run in lockstep, one decoder layer of each in memory, so it runs where the merge ran.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from qmerge.calibration import texts
from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.statistics import Stream
from qmerge.checkpoint.scan import scan
from qmerge.pipeline import RunContext, dense_values, unmerged_values
from qmerge.planning.plan import Plan, make_plan
from qmerge.recipe import OPTIONS, Recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import FidelityRecord

POSITIONS = 256
"""Token positions whose probabilities over the vocabulary are worked on at once."""


def fidelity(
    merged: Path, recipe: Recipe, text: Path, device: torch.device, tokens: int | None = None, length: int = 512,
    tell: Callable[[str], None] = lambda line: None,
) -> FidelityRecord:  # fmt: skip
    """Judge the model in ``merged``.

    Args:
        recipe: names the base and the adapter, and how the base was quantized in training.
        text: plain text or JSON lines, which the model was not trained on.
        tokens: how many tokens of it (all for None), in sequences of ``length``.
        tell: is told how far the work is.

    Raises:
        RecipeError, CheckpointError, AdapterError: an input cannot be read, or transformers cannot run the model.
    """
    plain = {
        "target": "fp32",
        "merge_onto": "dequantized",
        "original": None,
        "original_revision": None,
        "scales": "keep",
    }
    dropped = dict.fromkeys((*OPTIONS, "calibration"))
    with Reader() as reader:
        plan = make_plan(recipe.model_copy(update={**plain, **dropped, "rounding": "nearest"}), reader)
        config = plan.config
        length = min(length, texts.max_sequence_length(config))
        batches = texts.token_batches(text, plan.inputs.tokenizer_folder, tokens, length, texts.vocab_size(config))
        scores = run_streams(plan, merged, RunContext(reader, device, 0, plan.block_entries), batches, tell)
    count = sum(batch.numel() for batch in batches)
    return scores.record(text.name, count, batches[0].shape[1])


def run_streams(
    plan: Plan, merged: Path, context: RunContext, batches: Sequence[Tensor], tell: Callable[[str], None]
) -> Scores:
    """All batches through the three models, layer by layer; logits of one batch at a time."""
    sources = [
        base_values(plan, context, False),
        base_values(plan, context, True),
        folder_values(plan, merged, context),
    ]
    streams = [Stream(model, batches, logits=True) for model, _ in sources]
    try:
        return lockstep(sources, streams, batches, tell)
    finally:  # after an error, passes still wait in their threads, and hold what they computed
        for stream in streams:
            stream.stop()


def lockstep(
    sources: Sequence[tuple[LayeredModel, Values]], streams: Sequence[Stream], batches: Sequence[Tensor],
    tell: Callable[[str], None],
) -> Scores:  # fmt: skip
    """Every layer of every model once; only one model's layer is in memory at a time, and all three heads at the end."""
    for stream, (model, values) in zip(streams, sources, strict=True):
        with model.loaded(None, values):
            stream.start()
    for index in range(len(sources[0][0])):
        tell(f"judging: layer {index + 1} of {len(sources[0][0])}")
        last = index + 1 == len(sources[0][0])
        for stream, (model, values) in zip(streams, sources, strict=True):
            with model.loaded(index, values):
                stream.run(last)
    scores = Scores()
    for model, values in sources:
        model.load(None, model.names(None), values)
    for batch, ids in enumerate(batches):
        scores.add([stream.finish(batch) for stream in streams], ids.to(sources[0][0].device))
    return scores


def answer(folder: Path, ids_NL: Tensor) -> Tensor:
    """float32 logits [N, L, V] of a folder's stored values, by transformers' own code, layer by layer."""
    with Reader() as reader:
        checkpoint = scan(folder, reader)
        weights = {name: weight for name, weight in checkpoint.weights.items() if weight.format != "raw"}
        model = LayeredModel(checkpoint.config, weights, ids_NL.device)

        def values(name: str) -> Tensor:
            return dense_values(weights[name], reader, ids_NL.device, model.is_conv1d(name))

        stream = Stream(model, [ids_NL], logits=True)
        try:
            with model.loaded(None, values):
                stream.start()
            for index in range(len(model)):
                with model.loaded(index, values):
                    stream.run(last=index + 1 == len(model))
            with model.loaded(None, values), torch.inference_mode():
                return stream.finish(0).float()
        finally:
            stream.stop()


def base_values(plan: Plan, context: RunContext, with_delta: bool) -> tuple[LayeredModel, Values]:
    steps = {step.name: step for step in plan.steps if step.weight.format != "raw"}
    model = LayeredModel(plan.config, steps, context.device)
    return model, lambda name: unmerged_values(steps[name], context, model.is_conv1d(name), with_delta)


def folder_values(plan: Plan, folder: Path, context: RunContext) -> tuple[LayeredModel, Values]:
    weights = {name: w for name, w in scan(folder, context.reader).weights.items() if w.format != "raw"}
    model = LayeredModel(plan.config, weights, context.device)
    return model, lambda name: dense_values(weights[name], context.reader, context.device, model.is_conv1d(name))


@dataclass
class Scores:
    """Sums over tokens, in float64. Predictions exist for all positions, losses for all but the last."""

    losses: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    predicted: int = 0
    divergences: list[Tensor] = field(default_factory=list)
    agreed: int = 0

    def add(self, logits_NLV: Sequence[Tensor], ids_NL: Tensor) -> None:
        """Logits of a batch, [sequences, length, vocabulary], of base, unmerged and merged model; and its token ids."""
        following = torch.cat([ids_NL[:, 1:], torch.full_like(ids_NL[:, :1], -1)], dim=1).flatten()
        flat = [logits.flatten(0, 1) for logits in logits_NLV]
        for start in range(0, len(following), POSITIONS):
            part = slice(start, start + POSITIONS)
            base, unmerged, merged = (torch.log_softmax(logits[part].float(), -1) for logits in flat)
            known = following[part] >= 0
            target = following[part].clamp(min=0)[:, None]
            for i, log in enumerate((base, unmerged, merged)):
                self.losses[i] -= log.gather(-1, target)[known].double().sum().cpu()
            self.predicted += int(known.sum())
            self.divergences.append(torch.stack([divergence(unmerged, base), divergence(unmerged, merged)]).cpu())
            self.agreed += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())

    def record(self, text: str, tokens: int, length: int) -> FidelityRecord:
        base, unmerged, merged = (self.losses / self.predicted).tolist()
        to_base, to_merged = torch.cat(self.divergences, dim=1).double()
        kl_base, kl_merged = float(to_base.mean()), float(to_merged.mean())
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


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of every position, from log-probabilities."""
    return (p.exp() * (p - q)).sum(-1)
