"""The calibration pass: statistics of the inputs of every weight that ``preserve`` rounds, and what the rounded model is worth.

Decoder layer by decoder layer, the same text runs through two models: the unmerged adapter model, and the model as merged so
far. Weights that share an input (q, k and v; gate and up) form a group. When all batches have come to a group, its weights
are rounded and loaded into the merged model, and all batches go on with them: so each group can compensate for the rounding
before it (``InputStatistics``). With ``sequential`` off, only the unmerged model runs.

Some of the text is held out: it adds nothing to the statistics, but goes through both models, and through the base, with
their heads. How far the merged model is from the unmerged one on it is what rounding did to the whole model.

Nothing of a layer stays in memory but the hidden states that go into the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from qmerge.calibration.capture import (
    AllInputsSeen,
    GroupReached,
    MatrixProduct,
    PausingProducts,
    RecordedProducts,
    StoppingProducts,
    groups_by_input,
    without_expert_number,
)
from qmerge.calibration.forward import ForwardPass, LayerCall, pause
from qmerge.calibration.layerwise_run import LayerwiseRun, stopping
from qmerge.calibration.room import in_mapped_file, planned_memory, temporary_folder
from qmerge.calibration.scores import FinishedRun, finish_run, score_runs
from qmerge.calibration.stacks import matrix_names, of_stacks, steps_of
from qmerge.calibration.sums import InputSums
from qmerge.calibration.texts import CalibrationTokens
from qmerge.calibration.unmerged import steps_with_values, unmerged_model
from qmerge.planning.plan import Plan
from qmerge.rounding.base import InputStatistics
from qmerge.schema import FidelityRecord
from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.weights.heap import map_large_blocks
from qmerge.weights.values import in_dense_shape


class CalibratedGroup(NamedTuple):
    """Steps that can be done now, and the statistics of their inputs by step name."""

    steps: list[Step]
    statistics: dict[str, InputStatistics]


@dataclass(frozen=True)
class LayerGroups:
    """How the code of one decoder layer uses the weights that are calibrated.

    Attributes:
        groups: names of weights that share an input, in the order of the layer's code.
        into_stream: weights whose product is added to the residual stream as it is (o_proj, down_proj).
        once: whether each weight is multiplied once, with all tokens. Experts are not: they take turns with some tokens each.
    """

    groups: tuple[tuple[str, ...], ...]
    into_stream: frozenset[str]
    once: bool


class CalibrationPass:
    """One calibration of a plan.

    Args:
        stored_values: of a step that has been done, the float32 values [O, I] that a loader will read.
        report_progress: called with one line per decoder layer.

    Attributes:
        merged: the model as merged so far; the unmerged one where the plan is not sequential.
        fidelity: of the merged model on the held-out tokens, when all groups are done; None where none are held out.
        in_turn: whether batches take turns in a layer, because they do not fit into memory together.
    """

    def __init__(
        self,
        plan: Plan,
        context: RunContext,
        tokens: CalibrationTokens,
        *,
        stored_values: Callable[[Step], Tensor],
        report_progress: Callable[[str], None],
    ) -> None:
        map_large_blocks()
        self.plan = plan
        self.context = context
        self.tokens = tokens
        self.stored_values = stored_values
        self.report_progress = report_progress
        self.steps = steps_with_values(plan)
        self.preserved = {step.name: step for step in plan.rounded if step.rounding == "preserve"}
        # Other steps were done before the first layer: the merged model has their stored values from the start.
        self.done = {step.name for step in plan.rounded if step.name not in self.preserved}
        self.unmerged, self.unmerged_values = unmerged_model(plan, context)
        self.merged = self.unmerged
        if plan.recipe.sequential:
            self.merged, _ = unmerged_model(plan, context)
        self.fidelity: FidelityRecord | None = None
        _, self.in_turn = planned_memory(plan, sum(ids.numel() for ids in tokens.seen), context.device)
        self._keep: Callable[[Any], Any] | None = None
        if self.in_turn and context.device.type == "cpu":
            self._keep = partial(in_mapped_file, folder=temporary_folder(plan))
        self._known_groups: dict[tuple[str, ...], LayerGroups] = {}

    @property
    def sequential(self) -> bool:
        """Whether two models run."""
        return self.merged is not self.unmerged

    def groups(self) -> Iterator[CalibratedGroup]:
        """Calibrate group by group; the steps of a group must be done before the next one is asked for.

        Yields:
            All steps that are rounded with ``preserve``, each once. Those that the text does not reach come last, without
            statistics.

        Raises:
            CheckpointError: transformers does not know the architecture, or the base lacks a parameter.
        """
        runs = [LayerwiseRun(self.unmerged, self.unmerged_values, self.tokens.seen, keep=self._keep)]
        if self.sequential:
            runs.append(LayerwiseRun(self.merged, self._merged_values, self.tokens.seen, keep=self._keep))
        judged = self._judged_runs()
        finished: list[FinishedRun] = []
        with stopping([*runs, *judged]):
            for run in (*runs, *judged):
                run.start()
            for index in range(len(self.unmerged)):
                self.report_progress(f"calibrating layer {index + 1} of {len(self.unmerged)}")
                yield from self._layer(index, runs)
                finished = self._run_judged(index, judged)
                for run in runs:
                    run.model.unload(index)
            # lm_head is in no decoder layer, and an expert may not get a single token of the text.
            unreached = [step for name, step in self.preserved.items() if name not in self.done]
            if unreached:
                yield CalibratedGroup(unreached, {})
                self.done.update(step.name for step in unreached)
            if finished:
                self.fidelity = self._score(finished)

    def _judged_runs(self) -> list[LayerwiseRun]:
        """Base, unmerged and merged model on the held-out tokens. Without two models there is none that was merged."""
        if not self.tokens.held_out or not self.sequential:
            return []
        base, base_values = unmerged_model(self.plan, self.context, with_delta=False)
        models = [
            (base, base_values),
            (self.unmerged, self.unmerged_values),
            (self.merged, self._merged_values),
        ]
        return [LayerwiseRun(model, values, self.tokens.held_out) for model, values in models]

    def _run_judged(self, index: int, judged: Sequence[LayerwiseRun]) -> list[FinishedRun]:
        """Run the held-out tokens through a layer, when it has all of its stored weights.

        Returns:
            The runs, after the last layer; else nothing.
        """
        finished = []
        for run in judged:
            if run.model not in (self.unmerged, self.merged):  # the base: its layer is not loaded yet
                run.model.load(index, run.model.names(index), run.values)
            if index + 1 == len(self.unmerged):
                finished.append(finish_run(run))
            else:
                run.run_loaded_layer()
            if run.model not in (self.unmerged, self.merged):
                run.model.unload(index)
        return finished

    def _score(self, finished: Sequence[FinishedRun]) -> FidelityRecord:
        base, unmerged, merged = finished
        held_out = self.tokens.held_out
        of_what = "" if self.unmerged.predicts_tokens else f"{self.unmerged.judged} of "
        return score_runs(base, unmerged, merged, held_out).record(
            self.tokens.source,
            tokens=sum(ids.numel() for ids in held_out),
            length=held_out[0].shape[1],
            judged=self.unmerged.judged,
            text_kind=self.tokens.text_kind,
            measured_on=f"{of_what}{self.tokens.judged_on}, which rounding did not see",
        )

    def _layer(self, index: int, runs: Sequence[LayerwiseRun]) -> Iterator[CalibratedGroup]:
        # The merged model begins a layer with what is stored already, and gets the other weights group by group.
        for run in runs:
            run.model.load(index, run.model.names(index), run.values)
        layer = self._layer_groups(index, runs[0])
        if layer.groups and layer.once and not self.in_turn:
            yield from self._in_one_pass(index, layer, runs)
            return
        if layer.once:
            yield from self._batches_in_turn(index, layer, runs)
        else:
            yield from self._in_repeated_passes(index, layer, runs)
        if index + 1 < len(self.unmerged):  # nothing after the last layer is calibrated, so its outputs are not needed
            for run in runs:
                run.run_loaded_layer()

    # --- the groups of a layer ---

    def _layer_groups(self, index: int, run: LayerwiseRun) -> LayerGroups:
        preserved = [self.preserved[name] for name in self.unmerged.names(index) if name in self.preserved]
        wanted = [name for step in preserved for name in matrix_names(step)]
        # Layers with the same weights have the same code: only the first of them is tried out.
        key = tuple(_without_layer(name, index) for name in wanted)
        known = self._known_groups.get(key)
        if known is None:
            known = _renamed(self._try_out(run, wanted), lambda name: _without_layer(name, index))
            self._known_groups[key] = known
        name_of = dict(zip(key, wanted, strict=True))
        return _renamed(known, name_of.__getitem__)

    def _try_out(self, run: LayerwiseRun, wanted: Sequence[str]) -> LayerGroups:
        """Run one batch through the layer: every batch takes the same way through its code."""
        if not wanted:
            return LayerGroups((), frozenset(), once=True)
        call = run.waiting[0]
        with RecordedProducts(run.model, wanted, residual_stream(call)) as capture:
            run.model.run_layer(call)
        groups = groups_by_input(capture.products, wanted)
        multiplied = [name for product in capture.products for name in product.names]
        has_experts = any(without_expert_number(name) != name for name in wanted)
        return LayerGroups(
            tuple(map(tuple, groups)),
            frozenset(capture.into_stream),
            once=not has_experts and sorted(multiplied) == sorted(wanted),
        )

    # --- every batch runs through the layer once ---

    def _in_one_pass(self, index: int, layer: LayerGroups, runs: Sequence[LayerwiseRun]) -> Iterator[CalibratedGroup]:
        passes = [[_pausing_pass(run, call, layer) for call in run.waiting] for run in runs]

        def finish(number: int, batch: int) -> None:
            output = passes[number][batch].advance()
            if index + 1 < len(self.unmerged):
                runs[number].go_on(batch, output)

        try:
            for names in layer.groups:
                sums = InputSums(names, self.context.device, of_task=self.tokens.is_of_task)
                for batch in range(len(self.tokens.seen)):
                    reached: list[GroupReached] = [passes_of_run[batch].advance() for passes_of_run in passes]
                    self._add_reached(sums, reached, layer)
                    del reached
                    # The unmerged model does not wait for the rounding of its last group: so the memory of its batches is free.
                    if names == layer.groups[-1] and self.sequential:
                        finish(0, batch)
                yield from self._rounded(index, names, sums.statistics())
            for batch in range(len(self.tokens.seen)):
                finish(-1, batch)
        finally:
            for layer_pass in (one for passes_of_run in passes for one in passes_of_run):
                layer_pass.stop()

    def _batches_in_turn(
        self, index: int, layer: LayerGroups, runs: Sequence[LayerwiseRun]
    ) -> Iterator[CalibratedGroup]:
        """The same numbers, with one batch in memory: it begins the layer again for every group."""
        for number, names in enumerate(layer.groups):
            sums = InputSums(names, self.context.device, of_task=self.tokens.is_of_task)
            for batch in range(len(self.tokens.seen)):
                passes = [_pausing_pass(run, run.waiting[batch], layer) for run in runs]
                for _ in range(number):
                    for layer_pass in passes:
                        layer_pass.advance()
                self._add_reached(sums, [layer_pass.advance() for layer_pass in passes], layer)
                for layer_pass in passes:
                    layer_pass.stop()
            yield from self._rounded(index, names, sums.statistics())

    def _add_reached(self, sums: InputSums, reached: Sequence[GroupReached], layer: LayerGroups) -> None:
        """Add the inputs of a group, of one batch, in the unmerged and in the merged model (one of them: not sequential)."""
        merged = reached[-1]
        into_stream = [name for name in sums.names if name in layer.into_stream]
        products = [[MatrixProduct(tuple(sums.names), group.x)] for group in reached]
        needs_cross = self.sequential and len(into_stream) < len(sums.names)
        sums.add(products[0] if needs_cross else None, products[-1])
        if self.sequential:
            for name in into_stream:
                # The weight is not rounded yet in either model.
                weight = self.unmerged.model.get_parameter(self.unmerged.parameters[name]).detach()
                if not self.unmerged.is_conv1d(name):
                    weight = weight.T
                missing = reached[0].stream - merged.stream
                sums.add_missing(name, missing.flatten(0, -2).addmm(reached[0].x - merged.x, weight), merged.x)

    # --- every batch begins the layer again for every group ---

    def _in_repeated_passes(
        self, index: int, layer: LayerGroups, runs: Sequence[LayerwiseRun]
    ) -> Iterator[CalibratedGroup]:
        """For experts, which a batch does not reach one after the other."""
        for names in layer.groups:
            sums = InputSums(names, self.context.device, of_task=self.tokens.is_of_task)
            for batch in range(len(self.tokens.seen)):
                # Which experts get tokens is not known before the layer ends; other groups end with their last weight.
                products_of_runs = [_products(run, batch, names, stop=not sums.has_experts) for run in runs]
                unmerged = products_of_runs[0] if self.sequential else None
                sums.add(unmerged, products_of_runs[-1])
            yield from self._rounded(index, names, sums.statistics())

    # --- the merged model ---

    def _rounded(
        self, index: int, names: Sequence[str], statistics: dict[str, InputStatistics]
    ) -> Iterator[CalibratedGroup]:
        """Have a group rounded, and load its stored values into the merged model."""
        steps = steps_of(names, self.preserved)
        yield CalibratedGroup(steps, {**statistics, **of_stacks(steps, statistics)})
        # The caller has done the steps: their stored values can be read now.
        self.done.update(step.name for step in steps)
        if self.sequential:
            self._load_stored(index, [step.name for step in steps])

    def _load_stored(self, index: int, names: Iterable[str]) -> None:
        # A parameter that holds several weights (stacked experts) is made anew of all of them.
        changed = {self.merged.parameters[name] for name in names}
        parts = [name for name in self.merged.names(index) if self.merged.parameters[name] in changed]
        with self.merged.same_memory(changed):  # the batches that wait have the tensors in hand
            self.merged.load(index, parts, self._merged_values)

    def _merged_values(self, name: str) -> Tensor:
        if name not in self.done:
            return self.unmerged_values(name)
        step = self.steps[name]
        values_OI = self.stored_values(step)
        if self.unmerged.is_conv1d(name):
            return values_OI.T.contiguous()
        return in_dense_shape(values_OI, step)


def _pausing_pass(run: LayerwiseRun, call: LayerCall, layer: LayerGroups) -> ForwardPass:
    """One batch on its way through a layer; it stops at every group, and ends with the layer's output."""

    def run_layer() -> Any:
        with PausingProducts(run.model, layer.groups, residual_stream(call), pause):
            return run.model.run_layer(call)

    return ForwardPass(run_layer)


def _products(run: LayerwiseRun, batch: int, names: Sequence[str], *, stop: bool) -> list[MatrixProduct]:
    """Products with some weights of the layer at which the run waits."""
    call = run.waiting[batch]
    recorder = StoppingProducts if stop else RecordedProducts
    with recorder(run.model, names, residual_stream(call)) as capture, suppress(AllInputsSeen):
        run.model.run_layer(call)
    products: list[MatrixProduct] = capture.products
    return products


def residual_stream(call: LayerCall) -> Tensor:
    """The hidden states [sequences, length, width] that a decoder layer is called with."""
    hidden_states: Tensor = call.args[0] if call.args else call.kwargs["hidden_states"]
    return hidden_states


def _without_layer(name: str, index: int) -> str:
    """``model.layers.3.mlp.experts.3.w1`` → ``model.layers.*.mlp.experts.3.w1``: only the layer's number is taken out."""
    return re.sub(rf"\.{index}\.", ".*.", name, count=1)


def _renamed(layer: LayerGroups, rename: Callable[[str], str]) -> LayerGroups:
    groups = tuple(tuple(map(rename, names)) for names in layer.groups)
    return LayerGroups(groups, frozenset(map(rename, layer.into_stream)), layer.once)
