"""Where steps go: into the shards of an output folder, or nowhere, when a run only measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qmerge.checkpoint.journal import Journal
from qmerge.pipeline import Outcome, run_step
from qmerge.planning.plan import Plan
from qmerge.progress import Progress
from qmerge.rounding.base import InputStatistics
from qmerge.run import residual
from qmerge.run.workers import run_steps
from qmerge.safetensors_io.writer import MemorySink, NullSink, ShardWriter
from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.weights.values import stored_values


class Writing:
    """Steps go to the shards that they belong to. What an earlier run left is kept where its bytes hash to what the
    journal says; a shard is published when its last step is done."""

    def __init__(
        self, plan: Plan, context: RunContext, out: Path, resume: bool, journal: Journal, progress: Progress
    ) -> None:
        self.context, self.out, self.resume, self.journal, self.progress = context, out, resume, journal, progress
        self.workers = plan.recipe.workers
        self.shards = {step.name: shard for shard in plan.shards for step in shard.steps}
        self.left = {shard.file: len(shard.steps) for shard in plan.shards}
        self.writers: dict[str, ShardWriter] = {}
        self.rank, self.residuals = plan.recipe.residual, dict[str, residual.Residual]()
        self.outcomes: dict[str, Outcome] = {}

    def do(self, steps: Sequence[Step], inputs: Mapping[str, InputStatistics]) -> None:
        by_shard: dict[str, list[Step]] = {}
        for step in steps:
            by_shard.setdefault(self.shards[step.name].file, []).append(step)
        for file, group in by_shard.items():
            if file not in self.writers:
                layout = self.shards[group[0].name].layout
                self.writers[file] = ShardWriter(self.out / file, layout, self.resume)
            run_steps(group, lambda step: self._step(step, inputs.get(step.name)), self.workers)
            self.left[file] -= len(group)
            if not self.left[file]:
                self.journal.file_done(file, self.writers[file].finish())
                self.writers[file].publish()

    def _step(self, step: Step, inputs: InputStatistics | None) -> None:
        names, writer = tuple(step.outputs), self.writers[self.shards[step.name].file]
        earlier = self.journal.steps.get(step.name)
        if earlier and earlier["sha256"].keys() == writer.fixed(names) and writer.matches(earlier["sha256"]):
            record = earlier
        else:
            sink = writer.step(names)
            outcome = run_step(step, sink, self.context, inputs)
            record = {"sha256": sink.finish(), "texts": sink.texts, "outcome": outcome and vars(outcome)}
            self.journal.step_done(step.name, record)
        writer.add_texts(record["texts"])
        if record["outcome"] is not None:
            self.outcomes[step.name] = Outcome(**record["outcome"])
            if self.rank:
                self.residuals[step.name] = residual.fit(step, self.stored(step), inputs, self.context, self.rank)
        self.progress.advance(step.weight.nbytes, step.name)

    def stored(self, step: Step) -> Tensor:
        """float32 [O, I] of a step that is done, read back from what was written; with its residual, where one is
        written beside it, because then the next layers see both."""
        writer = self.writers[self.shards[step.name].file]
        values_OI = stored_values(step, writer.read, self.context)
        beside = self.residuals.get(step.name)
        return values_OI if beside is None else values_OI + (beside.B_OR @ beside.A_RI).to(values_OI.device)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Measuring:
    """Steps go nowhere; what the last ones would have written is there to be read back."""

    def __init__(self, context: RunContext, workers: int, progress: Progress) -> None:
        self.context, self.workers, self.progress = context, workers, progress
        self.outcomes: dict[str, Outcome] = {}
        self._sinks: dict[str, MemorySink] = {}

    def do(self, steps: Sequence[Step], inputs: Mapping[str, InputStatistics]) -> None:
        self._sinks.clear()
        run_steps(steps, lambda step: self._step(step, inputs), self.workers)

    def _step(self, step: Step, inputs: Mapping[str, InputStatistics]) -> None:
        sink = MemorySink() if step.name in inputs else NullSink()
        if isinstance(sink, MemorySink):
            self._sinks[step.name] = sink
        outcome = run_step(step, sink, self.context, inputs.get(step.name))
        if outcome is not None:
            self.outcomes[step.name] = outcome
        self.progress.advance(step.weight.nbytes, step.name)

    def stored(self, step: Step) -> Tensor:
        return stored_values(step, self._sinks[step.name].read, self.context)
