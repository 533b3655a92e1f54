"""Base, unmerged and merged model on the same text: losses and divergences of their predictions.

The logits of a text are large: 2,048 tokens times a vocabulary of 49,152 are 0.4 GB for each model. So only the outputs of
the last decoder layer are kept, and the head (final norm, output matrix, whatever the model's code does with the logits)
runs on a few positions at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qmerge.calibration.forward import ForwardPass, LayerCall
from qmerge.calibration.layered import LayeredModel, Values
from qmerge.calibration.layerwise_run import LayerwiseRun
from qmerge.schema import FidelityRecord, TextKind
from qmerge.weights.heap import release_freed_memory

POSITIONS = 64
"""Token positions, over all sequences of a batch, whose logits are in memory at once. A few more where the sequences of a
batch are many."""


@dataclass(frozen=True)
class FinishedRun:
    """A run after its last decoder layer.

    model    its weights need not be loaded
    values   of the weights that are in no decoder layer
    outputs  per batch, what the last decoder layer returned
    """

    model: LayeredModel
    values: Values
    outputs: Sequence[Any]


def finish_run(run: LayerwiseRun, values: Values | None = None) -> FinishedRun:
    """Run all batches through the last decoder layer, at which they wait. It must be loaded.

    Args:
        values: of the final norm, the output matrix and the embeddings; None for those of the run.
    """
    outputs = [run.model.run_layer(call) for call in run.waiting]
    return FinishedRun(run.model, values or run.values, outputs)


def score_runs(base: FinishedRun, unmerged: FinishedRun, merged: FinishedRun, batches: Sequence[Tensor]) -> Scores:
    """Compare three models on the text that they were run on.

    Loads what is in no decoder layer (embeddings, final norm, output matrix), once where the three models have equal values,
    and unloads it.

    Args:
        batches: the token ids that the runs were made with, int64 [sequences, length] each.
    """
    scores = Scores()
    runs = [base, unmerged, merged]
    with _loaded_heads(runs) as heads:
        for batch, ids_NL in enumerate(batches):
            next_NL = next_ids(ids_NL)
            for positions in _position_blocks(ids_NL):
                base_PV, unmerged_PV, merged_PV = (
                    _logits(head, ids_NL, run.outputs[batch], positions) for head, run in zip(heads, runs, strict=True)
                )
                next_P = next_NL[:, positions].flatten().to(base_PV.device)
                scores.add(next_P, base=base_PV, unmerged=unmerged_PV, merged=merged_PV)
                release_freed_memory()
    return scores


@contextmanager
def _loaded_heads(runs: Sequence[FinishedRun]) -> Iterator[list[LayeredModel]]:
    """Inside, what is in no decoder layer is loaded. Yields the model to use for each run."""
    heads: list[LayeredModel] = []
    try:
        for run in runs:
            run.model.load(None, run.model.names(None), run.values)
            heads.append(run.model)
            # An adapter seldom changes the head. Embeddings and output matrix can be a large part of a model.
            if len(heads) > 1 and _equal_heads(heads[0], run.model):
                heads[-1] = heads[0]
                run.model.unload(None)
        yield heads
    finally:
        for run in runs:
            run.model.unload(None)


def _equal_heads(one: LayeredModel, other: LayeredModel) -> bool:
    values = dict(_head_parameters(one))
    other_values = dict(_head_parameters(other))
    if values.keys() != other_values.keys():
        return False
    return all(torch.equal(values[name], other_values[name]) for name in values)


def _head_parameters(model: LayeredModel) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.model.named_parameters(remove_duplicate=False):
        if model.layer_of(name) is None:
            yield name, parameter


def _position_blocks(ids_NL: Tensor) -> Iterator[Tensor]:
    """Positions in a sequence, int64, so many at a time that all sequences together have about ``POSITIONS``."""
    sequences, length = ids_NL.shape
    yield from torch.split(torch.arange(length), max(1, POSITIONS // sequences))


def _logits(model: LayeredModel, ids_NL: Tensor, last_output: Any, positions: Tensor) -> Tensor:
    """float32 logits [sequences · positions, V] of some positions, by the model's own code.

    The model's forward function runs from its beginning, with the output of the last layer in place of every layer's: so it
    goes on after the last layer as it always does.
    """
    arguments: dict[str, Any] = {"input_ids": ids_NL.to(model.device), "use_cache": False}
    selects_positions = "logits_to_keep" in inspect.signature(model.model.forward).parameters
    if selects_positions:
        arguments["logits_to_keep"] = positions.to(model.device)
    forward_pass = ForwardPass(partial(model.model, **arguments))
    result = forward_pass.advance()
    while isinstance(result, LayerCall):
        result = forward_pass.advance(last_output)
    logits_NPV: Tensor = result.logits
    if not selects_positions:  # xLSTM is the only one in transformers 5.23
        logits_NPV = logits_NPV[:, positions.to(logits_NPV.device)]
    return logits_NPV.flatten(0, 1).float()


def next_ids(ids_NL: Tensor) -> Tensor:
    """The token that follows each position, int64 [N, L]; −1 after the last one of a sequence, which is not known."""
    return torch.cat([ids_NL[:, 1:], torch.full_like(ids_NL[:, :1], -1)], dim=1)


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

    def add(self, next_P: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        """Add the logits [P, V] of the three models at P positions.

        Args:
            next_P: ids of the tokens that follow, int64 [P]; −1 where the token is not known.
        """
        self._add_log_probabilities(
            next_P,
            base=torch.log_softmax(base.float(), -1),
            unmerged=torch.log_softmax(unmerged.float(), -1),
            merged=torch.log_softmax(merged.float(), -1),
        )

    def _add_log_probabilities(self, next_P: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        known = next_P >= 0
        target = next_P.clamp(min=0)[:, None]
        for model, log_probabilities in enumerate((base, unmerged, merged)):
            self.losses[model] -= log_probabilities.gather(-1, target)[known].double().sum().cpu()
        self.predicted += int(known.sum())
        self.divergences.append(torch.stack([kl_divergence(unmerged, base), kl_divergence(unmerged, merged)]).cpu())
        self.agreed += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())

    def record(
        self, text: str, *, tokens: int, length: int, text_kind: TextKind = "given", measured_on: str = ""
    ) -> FidelityRecord:
        """The means, as qmerge.json has them.

        Args:
            text: name of the text's file.
            tokens, length: of the whole text, and of one sequence.
            text_kind: see ``TextKind``.
            measured_on: what the text is, in words; "" for ``text`` and its tokens.
        """
        base, unmerged, merged = (self.losses / self.predicted).tolist()
        to_base, to_merged = torch.cat(self.divergences, dim=1).double()
        kl_base = float(to_base.mean())
        kl_merged = float(to_merged.mean())
        return FidelityRecord(
            text=text,
            text_kind=text_kind,
            measured_on=measured_on,
            tokens=tokens,
            sequence_length=length,
            loss_base=base,
            loss_unmerged=unmerged,
            loss_merged=merged,
            gain_kept=_gain_kept(base, unmerged, merged, text_kind),
            kl_base=kl_base,
            kl_merged=kl_merged,
            # Equal outputs: an adapter without effect.
            kl_ratio=kl_merged / kl_base if kl_base > 0 else None,
            top1_agreement=self.agreed / tokens,
            kl_p99=float(to_merged.quantile(0.99)),
        )


def _gain_kept(base: float, unmerged: float, merged: float, text_kind: TextKind) -> float | None:
    # Text that the unmerged model wrote is likeliest under that model: there the losses differ by the KL divergences, and
    # gain kept is 1 − KL ratio, whatever became of the task. (SmolLM2-135M: 0.99 on such text, 0.94 on text of the task.)
    if text_kind == "generated":
        return None
    # An adapter that does not lower the loss on this text has no gain to keep.
    if base <= unmerged:
        return None
    return (base - merged) / (base - unmerged)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) of every position, from log-probabilities [positions, V]."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)
