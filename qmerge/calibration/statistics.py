"""Statistics of the inputs of every weight that ``preserve`` rounds: H = E[x xᵀ], as in GPTQ, and how x differs after rounding.

Decoder layer by decoder layer, the same text runs through two models: the unmerged adapter model, and the model as merged so
far. Weights that share an input (q, k and v; gate and up) form a group. The groups of a layer are calibrated, rounded and
loaded into the merged model one after the other, so that each can compensate for the rounding before it
(``InputStatistics.correction``). With ``sequential`` off, only the unmerged model runs, and a layer's weights are one group.
Nothing of a layer stays in memory but the hidden states that go into the next.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from torch import Tensor

from qmerge.calibration.capture import AllInputsSeen, MatrixProduct, ProductCapture, without_expert_number
from qmerge.calibration.layered import LayeredModel
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.sums import InputSums
from qmerge.calibration.unmerged import steps_with_values, unmerged_model
from qmerge.planning.plan import Plan
from qmerge.rounding.base import InputStatistics
from qmerge.types import Step
from qmerge.weights.context import RunContext


class CalibratedGroup(NamedTuple):
    """Steps that can be done now, and the statistics of their inputs by step name."""

    steps: list[Step]
    statistics: dict[str, InputStatistics]


def calibrated_groups(
    plan: Plan,
    context: RunContext,
    batches: Sequence[Tensor],
    *,
    stored_values: Callable[[Step], Tensor],
    report_progress: Callable[[str], None],
) -> Iterator[CalibratedGroup]:
    """Calibrate a plan's weights, group by group; the steps of a group must be done before the next one is asked for.

    Args:
        batches: token ids, int64 [sequences, length] each.
        stored_values: of a step that has been done, the float32 values [O, I] that a loader will read.
        report_progress: called with one line per decoder layer.

    Yields:
        All steps that are rounded with ``preserve``, each once. Those that the text does not reach come last, without
        statistics.

    Raises:
        CheckpointError: transformers does not know the architecture, or the base lacks a parameter.
    """
    yield from _Calibration(plan, context, stored_values).run(batches, report_progress)


class _Calibration:
    """One calibration of a plan. ``merged``: the model as merged so far; None where the plan is not sequential."""

    def __init__(self, plan: Plan, context: RunContext, stored_values: Callable[[Step], Tensor]) -> None:
        self.steps = steps_with_values(plan)
        self.preserved = {step.name: step for step in plan.rounded if step.rounding == "preserve"}
        self.context = context
        self.stored_values = stored_values
        self.unmerged, self.unmerged_values = unmerged_model(plan, context)
        self.merged: LayeredModel | None = None
        if plan.recipe.sequential:
            self.merged, _ = unmerged_model(plan, context)
        self.done: set[str] = set()

    def run(self, batches: Sequence[Tensor], report_progress: Callable[[str], None]) -> Iterator[CalibratedGroup]:
        """Calibrate layer by layer; see ``calibrated_groups``."""
        runs = [LayerwiseRun(self.unmerged, self.unmerged_values, batches)]
        if self.merged:
            runs.append(LayerwiseRun(self.merged, self.unmerged_values, batches))
        with stopping(runs):
            for run in runs:
                run.start()
            for index in range(len(self.unmerged)):
                report_progress(f"calibrating layer {index + 1} of {len(self.unmerged)}")
                yield from self._layer(index, runs)
        # lm_head is in no decoder layer, and an expert may not get a single token of the text.
        unreached = [step for name, step in self.preserved.items() if name not in self.done]
        if unreached:
            yield CalibratedGroup(unreached, {})

    def _layer(self, index: int, runs: Sequence[LayerwiseRun]) -> Iterator[CalibratedGroup]:
        # Both models begin a layer with the unmerged weights. The merged one gets the stored weights group by group.
        for run in runs:
            run.model.load(index, run.model.names(index), run.values)
        for names in self._groups(index, runs[0]):
            statistics = self._statistics(names, runs)
            yield CalibratedGroup([self.preserved[name] for name in names], statistics)
            # The caller has done the steps: their stored values can be read now.
            self.done.update(names)
            if self.merged:
                self._load_stored(self.merged, index, names)
        is_last = index + 1 == len(self.unmerged)
        for run in runs:
            if not is_last:  # nothing after the last layer is calibrated, so its outputs are not needed
                run.run_loaded_layer()
            run.model.unload(index)

    def _groups(self, index: int, run: LayerwiseRun) -> list[list[str]]:
        """Names of the weights to calibrate in a layer, in the groups in which they are rounded."""
        wanted = [name for name in self.unmerged.names(index) if name in self.preserved]
        if not wanted:
            return []
        # The first batch is enough: every batch takes the same way through the layer's code.
        with ProductCapture(run.model, wanted) as capture:
            run.model.run_layer(run.waiting[0])
        groups = groups_by_input(capture.products, wanted)
        if self.merged or not groups:
            return groups
        return [list(itertools.chain.from_iterable(groups))]

    def _statistics(self, names: Sequence[str], runs: Sequence[LayerwiseRun]) -> dict[str, InputStatistics]:
        """Statistics of a group's inputs over all batches."""
        sums = InputSums(names, self.context.device)
        for batch in range(len(runs[0].waiting)):
            # Which experts get tokens is not known before the layer ends; other groups end with their last weight.
            products_of_runs = [_products(run, batch, names, stop=not sums.has_experts) for run in runs]
            unmerged = products_of_runs[0] if self.merged else None
            sums.add(unmerged, products_of_runs[-1])
        return sums.statistics()

    def _load_stored(self, merged: LayeredModel, index: int, names: Sequence[str]) -> None:
        """Load the stored values of some weights into the merged model."""
        # A parameter that holds several weights (stacked experts) is made anew of all of them.
        changed = {merged.parameters[name] for name in names}
        parts = [name for name in merged.names(index) if merged.parameters[name] in changed]
        merged.load(index, parts, self._merged_values)

    def _merged_values(self, name: str) -> Tensor:
        if name not in self.done:
            return self.unmerged_values(name)
        step = self.steps[name]
        values_OI = self.stored_values(step)
        if self.unmerged.is_conv1d(name):
            return values_OI.T.contiguous()
        return values_OI.view(step.weight.shape)


def _products(run: LayerwiseRun, batch: int, names: Sequence[str], *, stop: bool) -> list[MatrixProduct]:
    """Products with some weights of the layer at which the run waits."""
    with ProductCapture(run.model, names, stop) as capture, suppress(AllInputsSeen):
        run.model.run_layer(run.waiting[batch])
    products: list[MatrixProduct] = capture.products
    return products


def groups_by_input(products: Sequence[MatrixProduct], wanted: Sequence[str]) -> list[list[str]]:
    """Weights that are multiplied with the same input, in the order in which the layer's own code comes to them.

    All experts of a layer are treated as one: ``w1`` of every expert is in the same group, also of those that got no token.
    """
    groups: dict[str, list[str]] = {}
    # Equal inputs have the same memory: ``products`` keeps all of them alive, so no address is used twice.
    first_of_input: dict[tuple[Any, ...], str] = {}
    for product in products:
        kind = without_expert_number(product.names[0])
        key = first_of_input.setdefault((product.x.data_ptr(), tuple(product.x.shape)), kind)
        for known_key, names in groups.items():
            if kind in map(without_expert_number, names):  # the same weight of another expert has been seen
                key = known_key
                break
        group = groups.setdefault(key, [])
        kinds = {without_expert_number(name) for name in product.names}
        for name in wanted:
            if without_expert_number(name) in kinds and name not in group:
                group.append(name)
    return list(groups.values())
