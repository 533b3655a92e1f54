"""Where the output of steps goes: into the files of an output folder, or nowhere, when a run only measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from qmerge.checkpoint.journal import Journal
from qmerge.pipeline import Outcome, run_step
from qmerge.planning.plan import Shard
from qmerge.progress import Progress
from qmerge.rounding.base import InputStatistics
from qmerge.run.residual import Residual, fit_residual
from qmerge.run.workers import run_parallel
from qmerge.safetensors_io.writer import MemorySink, NullSink, ShardWriter
from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.weights.values import stored_values


class Destination(ABC):
    """Runs steps and takes their output.

    outcomes: what was measured of every merged weight so far, by name of the weight.
    """

    def __init__(self, context: RunContext, workers: int, progress: Progress) -> None:
        self.context = context
        self.workers = workers
        self.progress = progress
        self.outcomes: dict[str, Outcome] = {}
        self._counted: set[str] = set()

    def start_stage(self, label: str, steps: Sequence[Step]) -> None:
        """Begin a stage of the progress for these steps.

        Where weights are rounded with ``preserve``, the bytes of those are counted, and no others: they take nearly all the
        time. (Copied embeddings, which come first, would let the time left begin with seconds instead of minutes.)
        """
        counted = [step for step in steps if step.rounding == "preserve"] or steps
        self._counted = {step.name for step in counted}
        self.progress.stage(label, sum(step.weight.nbytes for step in counted))

    def count(self, step: Step) -> None:
        """Report that a step is done, if its stage counts it."""
        if step.name in self._counted:
            self.progress.advance(step.weight.nbytes, step.name)

    @abstractmethod
    def run(self, steps: Sequence[Step], inputs: Mapping[str, InputStatistics]) -> None:
        """Run steps, each once.

        Args:
            inputs: name of a weight → statistics of its inputs, for the weights that calibration reached.
        """

    @abstractmethod
    def stored(self, step: Step) -> Tensor:
        """float32 [O, I] that the finished model computes with, of a step that was run last or before."""


class OutputFolder(Destination):
    """Writes every step to the file that it belongs to.

    A step of an earlier run is kept where its bytes still have the hashes in the journal. When the last step of a file is done,
    a thread syncs, hashes and names it, while the steps of the next file run.

    residuals: LoRAs that compensate for the rounding of merged weights, by name of the weight; empty without
    ``residual_rank``.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        context: RunContext,
        out: Path,
        journal: Journal,
        *,
        workers: int,
        resume: bool,
        residual_rank: int | None,
        progress: Progress,
    ) -> None:
        super().__init__(context, workers, progress)
        self.out = out
        self.journal = journal
        self.resume = resume
        self.residual_rank = residual_rank
        self.residuals: dict[str, Residual] = {}
        self.writers: dict[str, ShardWriter] = {}
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="qmerge-files")
        self._finished: list[Future[None]] = []
        self._shard_of: dict[str, Shard] = {}
        self._steps_left: dict[str, int] = {}
        for shard in shards:
            self._steps_left[shard.file] = len(shard.steps)
            for step in shard.steps:
                self._shard_of[step.name] = shard

    def run(self, steps: Sequence[Step], inputs: Mapping[str, InputStatistics]) -> None:
        steps_by_file: dict[str, list[Step]] = defaultdict(list)
        for step in steps:
            steps_by_file[self._shard_of[step.name].file].append(step)
        for file, group in steps_by_file.items():
            # Calibration comes back to a file several times, so it stays open until all is done.
            if file not in self.writers:
                layout = self._shard_of[group[0].name].layout
                self.writers[file] = ShardWriter(self.out / file, layout, self.resume)
            run_parallel(group, lambda step: self._run_step(step, inputs.get(step.name)), self.workers)
            self._steps_left[file] -= len(group)
            if not self._steps_left[file]:
                self._finished.append(self._finisher.submit(self._finish_file, file))

    def _finish_file(self, file: str) -> None:
        # The journal comes first: a file with its final name must have its hash there.
        self.journal.file_done(file, self.writers[file].finish())
        self.writers[file].publish()

    def finish(self) -> None:
        """Wait until every file whose steps are done has its final name."""
        for future in self._finished:
            future.result()

    def _run_step(self, step: Step, inputs: InputStatistics | None) -> None:
        record = self._earlier_record(step)
        if record is None:
            record = self._write_step(step, inputs)
        else:
            self._writer(step).step_done(record["sha256"], record["texts"])
        if record["outcome"] is not None:  # None for copies and conversions
            self.outcomes[step.name] = Outcome(**record["outcome"])
            if self.residual_rank:
                stored_OI = self.stored(step)
                residual = fit_residual(step, stored_OI, inputs, context=self.context, rank=self.residual_rank)
                self.residuals[step.name] = residual
        self.count(step)

    def _earlier_record(self, step: Step) -> dict[str, Any] | None:
        """What an earlier run has noted about a step, if the bytes on disk are still those that it wrote."""
        record = self.journal.steps.get(step.name)
        if record is None:
            return None
        writer = self._writer(step)
        hashes = record["sha256"]
        if hashes.keys() == writer.fixed(tuple(step.outputs)) and writer.matches(hashes):
            return record
        return None

    def _write_step(self, step: Step, inputs: InputStatistics | None) -> dict[str, Any]:
        """Run a step, and note it in the journal."""
        sink = self._writer(step).step(tuple(step.outputs))
        outcome = run_step(step, sink, self.context, inputs)
        record = {
            "sha256": sink.finish(),
            "texts": sink.texts,
            "outcome": None if outcome is None else vars(outcome),
        }
        self.journal.step_done(step.name, record)
        return record

    def stored(self, step: Step) -> Tensor:
        """As read back from the file; with the residual LoRA, which is loaded with the model."""
        values_OI = stored_values(step, self._writer(step).read, self.context)
        residual = self.residuals.get(step.name)
        if residual is None:
            return values_OI
        return values_OI + (residual.B_OR @ residual.A_RI).to(values_OI.device)

    def texts(self) -> dict[str, str]:
        """Name → content of the tensors whose size was known only at the end."""
        texts: dict[str, str] = {}
        for writer in self.writers.values():
            texts.update(writer.texts)
        return texts

    def close(self) -> None:
        """Close all files."""
        self._finisher.shutdown(cancel_futures=True)
        for writer in self.writers.values():
            writer.close()

    def _writer(self, step: Step) -> ShardWriter:
        return self.writers[self._shard_of[step.name].file]


class MeasureOnly(Destination):
    """Writes nothing. The outputs of the steps that were run last stay in memory where calibration needs them."""

    def __init__(self, context: RunContext, workers: int, progress: Progress) -> None:
        super().__init__(context, workers, progress)
        self._sinks: dict[str, MemorySink] = {}

    def run(self, steps: Sequence[Step], inputs: Mapping[str, InputStatistics]) -> None:
        # Only the steps of one group are read back, before the next group is run: memory does not grow with the model.
        self._sinks.clear()
        run_parallel(steps, lambda step: self._run_step(step, inputs.get(step.name)), self.workers)

    def _run_step(self, step: Step, inputs: InputStatistics | None) -> None:
        sink: MemorySink | NullSink = NullSink()
        if inputs is not None:  # the next layers are calibrated on what this one stores
            sink = self._sinks[step.name] = MemorySink()
        outcome = run_step(step, sink, self.context, inputs)
        if outcome is not None:
            self.outcomes[step.name] = outcome
        self.count(step)

    def stored(self, step: Step) -> Tensor:
        sink = self._sinks.get(step.name)
        if sink is None:  # done earlier, without calibration: the same again
            sink = MemorySink()
            run_step(step, sink, self.context)
        return stored_values(step, sink.read, self.context)
