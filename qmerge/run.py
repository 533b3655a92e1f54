"""A recipe → a finished folder: plan, check, walk the steps, publish. The same walk without writing is ``measure``."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from qmerge import calibration, candidates, plugins, residual, texts
from qmerge.budget import make_bench
from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import Journal
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.writer import MemorySink, NullSink, ShardWriter, write_file
from qmerge.errors import InputError, NumbersError, RecipeError
from qmerge.executors import threads
from qmerge.inputs import Inputs, read_inputs
from qmerge.judging import fidelity
from qmerge.metrics._totals import Sums
from qmerge.outlook import Outlook, for_identity, look_ahead
from qmerge.pipeline import Bench, Outcome, do, stored_values
from qmerge.planning import Plan, plan_from, retargeted
from qmerge.recipe import JUDGED_TOKENS, Recipe, parse_size
from qmerge.report import html
from qmerge.report.card import model_card
from qmerge.report.json import NAME as REPORT_NAME
from qmerge.report.json import FileRecord, InputRecord, ReportData, numbered
from qmerge.report.make import make_report
from qmerge.report.records import input_records
from qmerge.rounding._metric import Statistics
from qmerge.steps import DENSE
from qmerge.types import Step

RECIPE_NAME = "qmerge_recipe.yaml"


class Watcher(Protocol):
    """Who is told how far the work is (the terminal, a notebook, nobody)."""

    def stage(self, label: str, total: int) -> None:
        """A new stage of ``total`` bytes."""

    def advance(self, nbytes: int, label: str = "") -> None:
        """So many bytes more are done. With none, ``label`` says where work is that is not counted in bytes."""

    def say(self, line: str) -> None:
        """What the user should know."""

    def warn(self, line: str) -> None:
        """A warning in plain words."""

    def end(self) -> None:
        """No more stages."""


class Silent:
    def stage(self, label: str, total: int) -> None:
        pass

    def advance(self, nbytes: int, label: str = "") -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def warn(self, line: str) -> None:
        pass

    def end(self) -> None:
        pass


def merge(recipe: Recipe, resume: bool = False, watcher: Watcher | None = None) -> ReportData:
    """Merge an adapter into a base and write the model.

    Raises:
        RecipeError, InputError, NumbersError, RoomError: see ``errors.py``; nothing stays behind but what --resume needs.
    """
    watcher, started = watcher or Silent(), time.monotonic()
    if recipe.out is None:
        raise RecipeError("out is needed (--out): folder to write to; must not exist, or be empty")
    out = Path(recipe.out).expanduser()
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        if recipe.target == "auto":
            recipe, why = candidates.resolved(recipe, inputs, reader)
            watcher.say(why)
        plan = plan_from(recipe, inputs)
        bench = make_bench(plan, reader)
        folder.check_out(out, input_folders(plan.inputs), resume)
        if recipe.verify:
            texts.read_texts(Path(recipe.verify).expanduser())  # now, not when all else is done
        if recipe.promote:
            plan = with_promoted(plan, bench, watcher)
        folder.check_room(out, plan.bytes_out - reserved(out))
        watcher.stage("looking ahead", 1)
        plan, outlook = look_ahead(plan, bench, lambda at: watcher.advance(0, at))
        watcher.end()
        for line in outlook.says(plan):
            watcher.say(line)
        for line in outlook.warnings(plan):
            watcher.warn(line)
        existed = out.exists()
        with folder.locked(out):
            try:
                report = write_model(plan, bench, out, resume, outlook, watcher, started)
            except (NumbersError, InputError):  # no --resume can mend these
                folder.discard(out, made_by_us=not existed)
                raise
            finally:
                watcher.end()
            try:
                return judged(report, plan, bench, out, watcher) if recipe.verify else report
            finally:
                watcher.end()


def measure(recipe: Recipe, targets: Sequence[str] = (), watcher: Watcher | None = None) -> list[ReportData]:
    """The full run with a writer that throws away: what would survive, for one or several targets."""
    watcher, targets = watcher or Silent(), list(targets or [recipe.target])
    check_options(recipe, targets)
    if recipe.verify:
        return [judged_elsewhere(recipe, target, watcher) for target in targets]
    reports = []
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        records = input_records(inputs, watcher)
        for target in targets:
            started = time.monotonic()
            plan = plan_from(retargeted(recipe, target), inputs)
            bench = make_bench(plan, reader)
            plan, outlook = look_ahead(plan, bench)
            place = Measuring(bench, recipe.workers, watcher)
            watcher.stage(f"measuring {target}", sum(step.weight.nbytes for step in plan.rounded))
            try:
                walk(plan, plan.rounded, bench, place, outlook.batches, watcher)
            finally:
                watcher.end()
            reports.append(make_report(plan, bench, records, [], outlook, place.outcomes, started))
    return reports


def check_options(recipe: Recipe, targets: Sequence[str]) -> None:
    """An option that none of the targets takes is an error; one that some take is for those."""
    for name in recipe.asked:
        if not any(name in plugins.form(target).asks for target in targets):
            raise RecipeError(f"--{name.replace('_', '-')}: none of {', '.join(targets)} takes it")


def judged_elsewhere(recipe: Recipe, target: str, watcher: Watcher) -> ReportData:
    """A whole merge into a temporary folder (TMPDIR says where), judged there and thrown away."""
    with tempfile.TemporaryDirectory(prefix="qmerge-") as place:
        there = retargeted(recipe, target).model_copy(update={"out": f"{place}/{target}"})
        return merge(there, watcher=watcher).model_copy(update={"outputs": []})


def with_promoted(plan: Plan, bench: Bench, watcher: Watcher) -> Plan:
    """A first pass that writes nothing; the weights whose output is worst for each byte that 16 bits would cost are then
    planned in the model's own dtype, as far as the budget goes."""
    assert plan.recipe.promote is not None
    rehearsed, outlook = look_ahead(plan, bench)
    place = Measuring(bench, plan.recipe.workers, watcher)
    watcher.stage("measuring which weights survive worst", sum(step.weight.nbytes for step in rehearsed.rounded))
    try:
        walk(rehearsed, rehearsed.rounded, bench, place, outlook.batches, watcher)
    finally:
        watcher.end()
    losses = {step.name: loss(place.outcomes[step.name].sums) for step in rehearsed.merged}
    form = DENSE[plan.inputs.base.dtype]
    width = 4 if form == "fp32" else 2
    costs = {step.name: extra_bytes(step, width) for step in rehearsed.merged}
    budget, chosen = parse_size(plan.recipe.promote), list[str]()
    for name in sorted(losses, key=lambda name: -losses[name] / max(1, costs[name])):
        if 0 < costs[name] <= budget and losses[name] > 0:
            chosen, budget = [*chosen, name], budget - costs[name]
    spent = sum(costs[name] for name in chosen)
    watcher.say(f"Promoted to {form}: {len(chosen)} of {len(losses)} weights, {spent / 1e6:.1f} MB more.")
    return plan_from(plan.recipe, plan.inputs, frozenset(chosen))


def loss(sums: Sums) -> float:
    """What rounding does to the layer's output (to the weight, where its inputs were not seen)."""
    error = sums["output_noise"].get("error_error")
    return float(sums["noise"]["error_error"] if error is None else error)


def extra_bytes(step: Step, width: int) -> int:
    """What the weight takes more when it is dense, ``width`` bytes per value, than as planned."""
    return width * math.prod(step.shape) - sum(max(0, spec.nbytes) for spec in step.outputs.values())


def write_model(
    plan: Plan, bench: Bench, out: Path, resume: bool, outlook: Outlook, watcher: Watcher, started: float
) -> ReportData:  # fmt: skip
    """Every step, then every file; index, card and config last, so that an unfinished folder does not load."""
    records = input_records(plan.inputs, watcher)
    journal = Journal(out, identity(plan, bench, records, outlook), resume)
    place = Writing(plan, bench, out, resume, journal, watcher)
    watcher.stage("merging", sum(step.weight.nbytes for step in plan.steps))
    try:
        walk(plan, plan.steps, bench, place, outlook.batches, watcher)
    finally:
        place.close()
    folder.write_index(out, place.writers)
    folder.copy_side_files(out, folder.side_files(plan.inputs.base.folder, plan.inputs.beside_adapter))
    outputs = [FileRecord(file=name, **journal.files[name]) for name in sorted(journal.files)]
    report = make_report(plan, bench, records, outputs, outlook, place.outcomes, started)
    if place.rank and place.residuals:
        report.residual = residual.write(out, place.residuals, place.rank)
    write_file(out / RECIPE_NAME, pinned(plan).to_yaml().encode())
    write_faces(report, plan, out)
    target = plugins.form(plan.recipe.target)
    for name, content in target.side_files(plan.config.get("quantization_config") or {}).items():
        folder.write_json(out / name, content)
    folder.write_json(out / "config.json", plan.config, sort_keys=True)
    journal.remove()
    return report


def judged(report: ReportData, plan: Plan, bench: Bench, out: Path, watcher: Watcher) -> ReportData:
    """The report with the fidelity of the finished model; the model stays, whatever happens here."""
    assert plan.recipe.verify is not None
    watcher.stage("judging", 1)
    text, length = Path(plan.recipe.verify).expanduser(), plan.recipe.sequence_length
    record = fidelity(out, plan.recipe, text, bench.device, JUDGED_TOKENS, length, lambda at: watcher.advance(0, at))
    report = report.model_copy(update={"fidelity": record})
    write_faces(report, plan, out)
    return report


def write_faces(report: ReportData, plan: Plan, out: Path) -> None:
    write_file(out / REPORT_NAME, (report.model_dump_json(indent=1) + "\n").encode())
    write_file(out / html.NAME, html.html_report(report).encode())
    write_file(out / "README.md", model_card(report, plan).encode())


def walk(
    plan: Plan, steps: Sequence[Step], bench: Bench, place: Writing | Measuring, batches: Sequence[Tensor] | None, watcher: Watcher
) -> None:  # fmt: skip
    """Every step once: those that need no calibration as they come, the others wave by wave of the calibration."""
    calibrated = {step.name for step in steps if step.rounding == "preserve"} if batches is not None else set()
    place.do([step for step in steps if step.name not in calibrated], {})
    if calibrated:
        assert batches is not None
        for wave, inputs in calibration.waves(plan, bench, batches, place.stored, lambda at: watcher.advance(0, at)):
            place.do(wave, inputs)
    applied = {step.name for step in plan.merged}
    assert place.outcomes.keys() == applied, "planned and applied updates differ"


class Writing:
    """Steps go to the shards that they belong to. What an earlier run left is kept where its bytes hash to what the
    journal says; a shard is published when its last step is done."""

    def __init__(self, plan: Plan, bench: Bench, out: Path, resume: bool, journal: Journal, watcher: Watcher) -> None:
        self.bench, self.out, self.resume, self.journal, self.watcher = bench, out, resume, journal, watcher
        self.workers = plan.recipe.workers
        self.shards = {step.name: shard for shard in plan.shards for step in shard.steps}
        self.left = {shard.file: len(shard.steps) for shard in plan.shards}
        self.writers: dict[str, ShardWriter] = {}
        self.rank, self.residuals = plan.recipe.residual, dict[str, residual.Residual]()
        self.outcomes: dict[str, Outcome] = {}

    def do(self, steps: Sequence[Step], inputs: Mapping[str, Statistics]) -> None:
        by_shard: dict[str, list[Step]] = {}
        for step in steps:
            by_shard.setdefault(self.shards[step.name].file, []).append(step)
        for file, group in by_shard.items():
            if file not in self.writers:
                layout = self.shards[group[0].name].layout
                self.writers[file] = ShardWriter(self.out / file, layout, self.resume)
            threads.run(group, lambda step: self._step(step, inputs.get(step.name)), self.workers)
            self.left[file] -= len(group)
            if not self.left[file]:
                self.journal.file_done(file, self.writers[file].finish())
                self.writers[file].publish()

    def _step(self, step: Step, inputs: Statistics | None) -> None:
        names, writer = tuple(step.outputs), self.writers[self.shards[step.name].file]
        earlier = self.journal.steps.get(step.name)
        if earlier and earlier["sha256"].keys() == writer.fixed(names) and writer.matches(earlier["sha256"]):
            record = earlier
        else:
            sink = writer.step(names)
            outcome = do(step, sink, self.bench, inputs)
            record = {"sha256": sink.finish(), "texts": sink.texts, "outcome": outcome and vars(outcome)}
            self.journal.step_done(step.name, record)
        writer.add_texts(record["texts"])
        if record["outcome"] is not None:
            self.outcomes[step.name] = Outcome(**record["outcome"])
            if self.rank:
                self.residuals[step.name] = residual.fit(step, self.stored(step), inputs, self.bench, self.rank)
        self.watcher.advance(step.weight.nbytes, step.name)

    def stored(self, step: Step) -> Tensor:
        """float32 [O, I] of a step that is done, read back from what was written; with its residual, where one is
        written beside it, because then the next layers see both."""
        writer = self.writers[self.shards[step.name].file]
        values_OI = stored_values(step, writer.read, self.bench)
        beside = self.residuals.get(step.name)
        return values_OI if beside is None else values_OI + (beside.B_OR @ beside.A_RI).to(values_OI.device)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Measuring:
    """Steps go nowhere; what the last ones would have written is there to be read back."""

    def __init__(self, bench: Bench, workers: int, watcher: Watcher) -> None:
        self.bench, self.workers, self.watcher = bench, workers, watcher
        self.outcomes: dict[str, Outcome] = {}
        self._sinks: dict[str, MemorySink] = {}

    def do(self, steps: Sequence[Step], inputs: Mapping[str, Statistics]) -> None:
        self._sinks.clear()
        threads.run(steps, lambda step: self._step(step, inputs), self.workers)

    def _step(self, step: Step, inputs: Mapping[str, Statistics]) -> None:
        sink = MemorySink() if step.name in inputs else NullSink()
        if isinstance(sink, MemorySink):
            self._sinks[step.name] = sink
        outcome = do(step, sink, self.bench, inputs.get(step.name))
        if outcome is not None:
            self.outcomes[step.name] = outcome
        self.watcher.advance(step.weight.nbytes, step.name)

    def stored(self, step: Step) -> Tensor:
        return stored_values(step, self._sinks[step.name].read, self.bench)


def pinned(plan: Plan) -> Recipe:
    """The recipe with the commits that its revisions stood for, so that it makes the same model again."""
    inputs = plan.inputs
    commits = {
        "revision": inputs.base_source.commit,
        "adapter_revision": inputs.adapter_source.commit if len(inputs.adapter_sources) == 1 else None,
        "original_revision": inputs.original_source.commit if inputs.original_source else None,
    }
    return plan.recipe.model_copy(update={name: commit for name, commit in commits.items() if commit})


def identity(plan: Plan, bench: Bench, records: Sequence[InputRecord], outlook: Outlook) -> dict[str, Any]:
    """What a resumed run must share with the one it resumes."""
    return {
        **{name: version(name) for name in ("qmerge", "torch", "bitsandbytes", "transformers")},
        "device": bench.device.type,
        "recipe": plan.recipe.identity(),
        "input": {f"{role} {f.file}": f.sha256 for role, r in numbered(records) for f in r.files},
        **for_identity(outlook),
        "promoted": sorted(plan.promoted),
        "output": {shard.file: len(shard.steps) for shard in plan.shards},
    }


def input_folders(inputs: Inputs) -> dict[str, Path]:
    folders = {"the base": inputs.base_source.folder}
    folders |= {f"the adapter {source.folder.name}": source.folder for source in inputs.adapter_sources}
    return {**folders, "the original": inputs.original_source.folder} if inputs.original_source else folders


def reserved(out: Path) -> int:
    """Bytes that an unfinished run in ``out`` has taken already."""
    return sum(path.stat().st_size for path in out.glob("*.safetensors*")) if out.is_dir() else 0
