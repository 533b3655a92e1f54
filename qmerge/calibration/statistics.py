"""Inputs of the unmerged adapter model → for each weight, what ``preserve`` must know of its inputs.

Decoder layer by decoder layer, two streams of the same text run side by side: one through the unmerged adapter model,
one through the model as merged so far. Where weights share an input (q, k and v; gate and up), they form a group; the
groups of a layer are calibrated, rounded and put into the merged stream one after the other, so that each can make up
for what rounding did before it (``Statistics.correction``). With ``sequential`` off there is one stream, and a layer's
weights are calibrated together. Nothing of a layer stays but the hidden states that go into the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qmerge.calibration.layered import LayeredModel, Pass, Visit
from qmerge.pipeline import RunContext, unmerged_values
from qmerge.planning.plan import Plan
from qmerge.rounding.base import Statistics
from qmerge.types import Step

Wave = tuple[list[Step], dict[str, Statistics]]
"""Steps that can be done now, and the statistics of their inputs by step name."""


def waves(
    plan: Plan,
    context: RunContext,
    batches: Sequence[Tensor],
    stored: Callable[[Step], Tensor],
    tell: Callable[[str], None],
) -> Iterator[Wave]:
    """Walk the model; the steps of each wave must be done before the next is asked for.

    Args:
        batches: token ids, int64 [sequences, length] each.
        stored: the float32 values [O, I] that a loader will read, of a step that has been done.
        tell: is told where the walk is.

    Raises:
        CheckpointError: transformers does not know the architecture, or the base lacks a parameter.
    """
    yield from Walk(plan, context, stored, tell).run(batches)


class Walk:
    def __init__(
        self, plan: Plan, context: RunContext, stored: Callable[[Step], Tensor], tell: Callable[[str], None]
    ) -> None:
        self.steps = {step.name: step for step in plan.steps if step.weight.format != "raw"}
        self.wanted = {step.name: step for step in plan.rounded if step.rounding == "preserve"}
        self.context, self.stored, self.tell = context, stored, tell
        config = plan.config
        self.unmerged = LayeredModel(config, self.steps, context.device)
        self.merged = LayeredModel(config, self.steps, context.device) if plan.recipe.sequential else None
        self.done: set[str] = set()

    def run(self, batches: Sequence[Tensor]) -> Iterator[Wave]:
        streams = [Stream(model, batches) for model in (self.unmerged, self.merged) if model]
        try:
            for stream in streams:
                with stream.model.loaded(None, self.unmerged_values):
                    stream.start()
            for index in range(len(self.unmerged)):
                self.tell(f"calibrating layer {index + 1} of {len(self.unmerged)}")
                yield from self.layer(index, streams)
        finally:  # after an error, passes still wait in their threads, and hold what they computed
            for stream in streams:
                stream.stop()
        left = [step for name, step in self.wanted.items() if name not in self.done]
        if left:  # lm_head, or what the text never reached
            yield left, {}

    def layer(self, index: int, streams: list[Stream]) -> Iterator[Wave]:
        for stream in streams:
            stream.model.load(index, stream.model.names(index), self.unmerged_values)
        wanted = [name for name in self.unmerged.names(index) if name in self.wanted]
        groups = self.groups(index, wanted, streams[0]) if wanted else []
        for names in groups if self.merged else [wanted_here(groups)] if groups else []:
            gathered = Gathering(names, streams, index, self.context.device)
            steps = [self.wanted[name] for name in names]
            yield steps, gathered.statistics()
            self.done.update(names)
            if self.merged:
                self.replace(index, names)
        last = index + 1 == len(self.unmerged)
        for stream in streams:
            if not last:
                stream.run()
            stream.model.unload(index)

    def groups(self, index: int, wanted: list[str], stream: Stream) -> list[list[str]]:
        """Weights that are fed at the same place, in the order in which the layer's own code comes to them."""
        with Capture(stream.model, index, wanted) as capture:
            stream.model.run_layer(stream.visits[0])
        groups: dict[str, list[str]] = {}
        group_of: dict[tuple[Any, ...], str] = {}
        for call in capture.calls:
            place = stripped(call.names[0])
            key = group_of.setdefault((call.x.data_ptr(), tuple(call.x.shape)), place)
            home = next((k for k, names in groups.items() if place in map(stripped, names)), key)
            known = groups.setdefault(home, [])
            alike = {stripped(name) for name in call.names}
            known += [name for name in wanted if stripped(name) in alike and name not in known]
        return list(groups.values())

    def replace(self, index: int, names: list[str]) -> None:
        """Put what was stored into the merged stream; parameters that hold several weights are put together anew."""
        assert self.merged is not None
        parameters = {self.merged.parameters[name] for name in names}
        whole = [name for name in self.merged.names(index) if self.merged.parameters[name] in parameters]
        self.merged.load(index, whole, self.merged_values)

    def merged_values(self, name: str) -> Tensor:
        if name not in self.done:
            return self.unmerged_values(name)
        step = self.steps[name]
        values_OI = self.stored(step)
        return values_OI.T.contiguous() if self.unmerged.is_conv1d(name) else values_OI.view(step.weight.shape)

    def unmerged_values(self, name: str) -> Tensor:
        return unmerged_values(self.steps[name], self.context, self.unmerged.is_conv1d(name))


def wanted_here(groups: list[list[str]]) -> list[str]:
    return [name for names in groups for name in names]


class Stream:
    """All batches on their way through one model; ``visits`` is where they stand. ``logits``: to the very end, through
    the head; else it is left out."""

    def __init__(self, model: LayeredModel, batches: Sequence[Tensor], logits: bool = False) -> None:
        self.model, self.visits, self.answers = model, list[Visit](), list[Any]()
        run: Any = model.model if logits else getattr(model.model, "base_model", model.model)
        self.passes = [Pass(partial(run, input_ids=ids.to(model.device), use_cache=False)) for ids in batches]

    def start(self) -> None:
        self.visits = [a_pass.step() for a_pass in self.passes]

    def run(self, last: bool = False) -> None:
        """Through the layer where they stand, and on to the next; after the last one, only its answers are kept."""
        for i, a_pass in enumerate(self.passes):
            answer = self.model.run_layer(self.visits[i])
            if last:
                self.answers.append(answer)
            else:
                self.visits[i] = a_pass.step(answer)

    def finish(self, batch: int) -> Tensor:
        """Logits [sequences, length, vocabulary] of one batch; the head must be loaded."""
        logits: Tensor = self.passes[batch].step(self.answers[batch]).logits
        return logits

    def stop(self) -> None:
        for a_pass in self.passes:
            a_pass.stop()


@dataclass(frozen=True)
class Call:
    """One matrix product: ``x`` [tokens, I] went into these weights (several where a parameter holds several)."""

    names: tuple[str, ...]
    x: Tensor


class Enough(Exception):  # noqa: N818  (nothing is wrong)
    """All inputs that were wanted have been seen."""


class Capture(TorchFunctionMode):
    """Sees every product of an input with a wanted weight, however the model's code comes to make it.

    A weight is known by where its values lie, so that slices of stacked experts are known, too.
    """

    def __init__(self, model: LayeredModel, index: int, wanted: Sequence[str], stop: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._stop, self._missing = stop, set(wanted)
        self._weights = dict[tuple[int, int], tuple[str, ...]]()
        for parameter, names in by_parameter(model, wanted).items():
            values = model.model.get_parameter(parameter)
            for part, held in parts_of(values, names, model):
                self._weights[values.untyped_storage().data_ptr(), part] = held

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in PRODUCTS:
            x, weight = args[PRODUCTS[func][0]], args[PRODUCTS[func][1]]
            names = self._weights.get((weight.untyped_storage().data_ptr(), weight.storage_offset()))
            if names:
                self.calls.append(Call(names, x.detach().reshape(-1, x.shape[-1]).float()))
                self._missing.difference_update(names)
                if self._stop and not self._missing:
                    raise Enough
        return func(*args, **(kwargs or {}))


PRODUCTS: dict[Any, tuple[int, int]] = {nn.functional.linear: (0, 1), torch.addmm: (1, 2)}
"""Function → which arguments are the inputs and the weight. (``addmm`` is what GPT-2's Conv1D calls.)"""


def by_parameter(model: LayeredModel, names: Sequence[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(model.parameters[name], []).append(name)
    return groups


def parts_of(values: Tensor, names: list[str], model: LayeredModel) -> Iterator[tuple[int, tuple[str, ...]]]:
    """(storage offset, weights that lie there): all at the start, or expert by expert in a stacked parameter."""
    if values.ndim < 3:
        yield int(values.storage_offset()), tuple(names)
        return
    for name_groups in {
        number_of(name): [n for n in names if number_of(n) == number_of(name)] for name in names
    }.items():
        number, held = name_groups
        yield int(values.storage_offset()) + number * int(values.stride(0)), tuple(held)


def number_of(name: str) -> int:
    """The expert's number: the last one in the name."""
    return int(re.findall(r"\.(\d+)(?=\.)", name)[-1])


def stripped(name: str) -> str:
    """The name without the expert's number: what stands for the same place in the layer's code."""
    return re.sub(r"(\.experts\.)\d+\.", r"\1", name)


class Gathering:
    """Sums over all batches: E[x̃ x̃ᵀ] and E[(x − x̃) x̃ᵀ] of some weights of one layer."""

    def __init__(self, names: list[str], streams: list[Stream], index: int, device: torch.device) -> None:
        self.names, self.device = names, device
        self.experts = any(stripped(name) != name for name in names)
        self.squares: dict[str, Tensor] = {}
        self.crosses: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = dict.fromkeys(names, 0)
        self.leader: dict[str, str] = {}
        for visits in zip(*(stream.visits for stream in streams), strict=True):
            calls = [self.calls_of(stream, index, visit) for stream, visit in zip(streams, visits, strict=True)]
            self.add(calls)

    def calls_of(self, stream: Stream, index: int, visit: Visit) -> list[Call]:
        with Capture(stream.model, index, self.names, stop=not self.experts) as capture, suppress(Enough):
            stream.model.run_layer(visit)
        calls: list[Call] = capture.calls
        return calls

    def add(self, calls: list[list[Call]]) -> None:
        """Weights that share an input share the sums (the first one keeps them). The two streams may send a token to
        different experts: there, inputs cannot be paired, and nothing is corrected."""
        first, last = (calls[-1] if self.experts else calls[0]), calls[-1]
        seen: dict[tuple[int, int], str] = {}
        for unmerged, merged in zip(first, last, strict=True):
            x = merged.x
            leader = seen.setdefault((x.data_ptr(), len(x)), merged.names[0])
            for name in merged.names:
                self.tokens[name] += len(x)
                self.leader[name] = leader
            if leader != merged.names[0]:
                continue
            self.add_product(self.squares, leader, x, x)
            if len(calls) > 1 and not self.experts:
                self.add_product(self.crosses, leader, unmerged.x - x, x)

    def add_product(self, sums: dict[str, Tensor], leader: str, one: Tensor, other: Tensor) -> None:
        if leader not in sums:
            sums[leader] = torch.zeros(one.shape[1], other.shape[1], device=self.device)
        sums[leader].addmm_(one.T, other)

    def statistics(self) -> dict[str, Statistics]:
        found: dict[str, Statistics] = {}
        for name, leader in self.leader.items():
            count = self.tokens[name]
            cross = self.crosses.get(leader)
            found[name] = Statistics(self.squares[leader] / count, None if cross is None else cross / count, count)
        return shared_out(found, self.names, self.squares, self.tokens, self.leader) if self.experts else found


def shared_out(
    found: dict[str, Statistics], names: list[str], squares: dict[str, Tensor], tokens: dict[str, int], leader: dict[str, str]
) -> dict[str, Statistics]:  # fmt: skip
    """Experts that saw fewer tokens than they have inputs borrow the rest from the other experts at the same place."""
    result = dict(found)
    for place in {stripped(name) for name in names}:
        here = [name for name in names if stripped(name) == place]
        seen = [name for name in here if name in found]
        if not seen:
            continue
        shared_II = sum((squares[leader[name]] for name in seen), torch.zeros_like(squares[leader[seen[0]]]))
        shared_II = shared_II / sum(tokens[name] for name in seen)
        for name in here:
            own = min(1.0, tokens[name] / len(shared_II))
            if own < 1:
                mixed_II = (1 - own) * shared_II + (own * found[name].hessian_II if name in found else 0)
                result[name] = Statistics(mixed_II, None, tokens[name], 1 - own)
    return result
