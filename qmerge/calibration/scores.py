"""Base, unmerged and merged model on the same inputs: losses and divergences of their outputs.

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
from qmerge.calibration.tasks import predicted_ids, token_arguments
from qmerge.schema import FidelityRecord, Judged, TextKind
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
            target_NL = predicted_ids(heads[0].model, ids_NL)
            for positions in _position_blocks(ids_NL):
                base_PV, unmerged_PV, merged_PV = (
                    _outputs(head, ids_NL, run.outputs[batch], positions) for head, run in zip(heads, runs, strict=True)
                )
                target_P = target_NL[:, positions].flatten().to(base_PV.device)
                if base.model.predicts_tokens:
                    scores.add(target_P, base=base_PV, unmerged=unmerged_PV, merged=merged_PV)
                else:
                    scores.add_vectors(base=base_PV, unmerged=unmerged_PV, merged=merged_PV)
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


def _outputs(model: LayeredModel, ids_NL: Tensor, last_output: Any, positions: Tensor) -> Tensor:
    """float32 outputs [sequences · positions, V] of some positions, by the model's own code: logits or hidden states.

    The model's forward function runs from its beginning, with the output of the last layer in place of every layer's: so it
    goes on after the last layer as it always does.
    """
    whole: Any = model.model
    if not model.predicts_tokens:  # transformers' name for the model without its head
        whole = whole.base_model
    arguments = token_arguments(whole, ids_NL.to(model.device))
    selects_positions = "logits_to_keep" in inspect.signature(whole.forward).parameters
    if selects_positions:
        arguments["logits_to_keep"] = positions.to(model.device)
    forward_pass = ForwardPass(partial(whole, **arguments))
    result = forward_pass.advance()
    while isinstance(result, LayerCall):
        result = forward_pass.advance(last_output)
    outputs_NPV: Tensor = result.logits if model.predicts_tokens else result.last_hidden_state
    if not selects_positions:
        outputs_NPV = outputs_NPV[:, positions.to(outputs_NPV.device)]
    return outputs_NPV.flatten(0, 1).float()


@dataclass
class Scores:
    """Sums over outputs, in float64: over positions that predict a token, over texts that have a class, over vectors.

    losses       sums of the cross entropy, [3]: base, unmerged, merged
    predicted    number of outputs with a loss; it is unknown where the right answer is
    divergences  per part of a batch, float32 [2, outputs]: KL(unmerged ‖ base) and KL(unmerged ‖ merged), or distances
    agreed       outputs where unmerged and merged model have the same likeliest token or class; None for vectors
    """

    losses: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))
    predicted: int = 0
    divergences: list[Tensor] = field(default_factory=list)
    agreed: int | None = 0

    def add(self, target_P: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        """Add the logits [P, V] of the three models, of P outputs.

        Args:
            target_P: the tokens or classes that are right, int64 [P]; −1 where that is not known.
        """
        self._add_log_probabilities(
            target_P,
            base=torch.log_softmax(base.float(), -1),
            unmerged=torch.log_softmax(unmerged.float(), -1),
            merged=torch.log_softmax(merged.float(), -1),
        )

    def _add_log_probabilities(self, target_P: Tensor, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        known = target_P >= 0
        target = target_P.clamp(min=0)[:, None]
        for model, log_probabilities in enumerate((base, unmerged, merged)):
            self.losses[model] -= log_probabilities.gather(-1, target)[known].double().sum().cpu()
        self.predicted += int(known.sum())
        self.divergences.append(torch.stack([kl_divergence(unmerged, base), kl_divergence(unmerged, merged)]).cpu())
        assert self.agreed is not None, "no vectors were added before"
        self.agreed += int((unmerged.argmax(-1) == merged.argmax(-1)).sum())

    def add_vectors(self, *, base: Tensor, unmerged: Tensor, merged: Tensor) -> None:
        """Add outputs [P, D] of the three models that are no probabilities."""
        self.agreed = None
        self.divergences.append(torch.stack([half_distance(unmerged, base), half_distance(unmerged, merged)]).cpu())

    def record(
        self,
        text: str,
        *,
        tokens: int,
        length: int,
        judged: Judged = "next tokens",
        text_kind: TextKind = "given",
        measured_on: str = "",
    ) -> FidelityRecord:
        """The means, as qmerge.json has them.

        Args:
            text: name of the text's file.
            tokens, length: of the whole text, and of one sequence.
            judged: what was added.
            text_kind: see ``TextKind``.
            measured_on: what the text is, in words; "" for ``text`` and its tokens.
        """
        base, unmerged, merged = self._mean_losses()
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
            top1_agreement=None if self.agreed is None else self.agreed / len(to_merged),
            kl_p99=float(to_merged.quantile(0.99)),
            judged=judged,
        )

    def _mean_losses(self) -> tuple[float | None, float | None, float | None]:
        if not self.predicted:
            return None, None, None
        base, unmerged, merged = (self.losses / self.predicted).tolist()
        return base, unmerged, merged


def _gain_kept(
    base: float | None, unmerged: float | None, merged: float | None, text_kind: TextKind
) -> float | None:  # fmt: skip
    if base is None or unmerged is None or merged is None:
        return None
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


def half_distance(p: Tensor, q: Tensor) -> Tensor:
    """½ ‖p − q‖² / ‖p‖² of every row [P, D]; of rows of length 1, this is 1 − cosine."""
    return (p - q).square().sum(-1) / (2 * p.square().sum(-1))
