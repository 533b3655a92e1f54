"""A recipe → a finished folder: plan, check, walk the steps, publish. The same walk without writing is ``measure``."""

from __future__ import annotations

import platform
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch

from qmerge import advice, hub
from qmerge.checkpoint import folder
from qmerge.checkpoint.journal import Journal
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.writer import NullSink, ShardWriter, hash_file, write_file
from qmerge.errors import InputError, NumbersError, RecipeError
from qmerge.executors import threads
from qmerge.metrics._totals import Sums, over_weights, values_of
from qmerge.pipeline import Bench, do
from qmerge.planning import Inputs, Plan, Shard, make_plan, plan_from, read_inputs, retargeted
from qmerge.predict import Survival, predict, total_kept
from qmerge.recipe import Recipe
from qmerge.report import html
from qmerge.report.card import model_card
from qmerge.report.json import NAME as REPORT_NAME
from qmerge.report.json import FileRecord, GroupRecord, InputRecord, ReportData, WeightRecord
from qmerge.types import Step

RECIPE_NAME = "qmerge_recipe.yaml"
VERSIONED = ("qmerge", "torch", "bitsandbytes", "peft", "transformers", "safetensors", "numpy")


class Watcher(Protocol):
    """Who is told how far the work is (the terminal, a notebook, nobody)."""

    def stage(self, label: str, total: int) -> None:
        """A new stage of ``total`` bytes."""

    def advance(self, nbytes: int, label: str = "") -> None:
        """So many bytes more are done."""

    def warn(self, line: str) -> None:
        """A warning in plain words."""

    def end(self) -> None:
        """No more stages."""


class Silent:
    def stage(self, label: str, total: int) -> None:
        pass

    def advance(self, nbytes: int, label: str = "") -> None:
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
        plan = make_plan(recipe, reader)
        bench = make_bench(plan, reader)
        folder.check_out(out, input_folders(plan.inputs), resume)
        folder.check_room(out, plan.bytes_out - reserved(out))
        predicted = warn_before(plan, bench, watcher)
        existed = out.exists()
        with folder.locked(out):
            try:
                return write_model(plan, bench, out, resume, predicted, watcher, started)
            except (NumbersError, InputError):  # no --resume can mend these
                folder.discard(out, made_by_us=not existed)
                raise
            finally:
                watcher.end()


def measure(recipe: Recipe, targets: Sequence[str] = (), watcher: Watcher | None = None) -> list[ReportData]:
    """The full run with a writer that throws away: what would survive, for one or several targets."""
    watcher = watcher or Silent()
    reports = []
    with Reader() as reader:
        inputs = read_inputs(recipe, reader)
        records = input_records(inputs, watcher)
        for target in targets or [recipe.target]:
            started = time.monotonic()
            plan = plan_from(retargeted(recipe, target), inputs)
            bench = make_bench(plan, reader)
            predicted = predict(plan, bench)
            measured: dict[str, Sums] = {}
            watcher.stage(f"measuring {target}", sum(step.weight.nbytes for step in plan.merged))

            def work(step: Step, bench: Bench = bench, measured: dict[str, Sums] = measured) -> None:
                sums = do(step, NullSink(), bench)
                assert sums is not None
                measured[step.name] = sums
                watcher.advance(step.weight.nbytes, step.name)

            try:
                threads.run(plan.merged, work, recipe.workers)
            finally:
                watcher.end()
            reports.append(make_report(plan, bench, records, [], predicted, measured, started))
    return reports


def make_bench(plan: Plan, reader: Reader) -> Bench:
    """Where to compute.

    Raises:
        RecipeError: cuda was asked for, and there is none.
    """
    asked = plan.recipe.device
    if asked == "cuda" and not torch.cuda.is_available():
        raise RecipeError("--device cuda: torch sees no CUDA device; use --device cpu or auto")
    name = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return Bench(reader, torch.device(name), plan.recipe.rounding, plan.recipe.seed, plan.block_entries)


def warn_before(plan: Plan, bench: Bench, watcher: Watcher) -> list[Survival]:
    predicted = predict(plan, bench)
    for line in [*input_warnings(plan), *advice.warnings(predicted, predicted=True)]:
        watcher.warn(line)
    return predicted


def input_warnings(plan: Plan) -> list[str]:
    """What is odd about the inputs, but no error."""
    files = folder.side_files(plan.inputs.base.folder, plan.inputs.adapter.folder)
    tokens = folder.tokens_beyond(files.get("tokenizer.json"), plan.config)
    return [tokens] if tokens else []


def write_model(
    plan: Plan, bench: Bench, out: Path, resume: bool, predicted: list[Survival], watcher: Watcher, started: float
) -> ReportData:  # fmt: skip
    """Every step, then every file; index, card and config last, so that an unfinished folder does not load."""
    records = input_records(plan.inputs, watcher)
    journal = Journal(out, identity(plan, bench, records), resume)
    watcher.stage("merging", sum(step.weight.nbytes for step in plan.steps))
    measured: dict[str, Sums] = {}
    writers = {
        shard.file: write_shard(shard, out, resume, journal, bench, measured, plan.recipe.workers, watcher)
        for shard in plan.shards
    }
    applied = {step.name for step in plan.merged}
    assert measured.keys() == applied, "planned and applied updates differ"
    folder.write_index(out, writers)
    folder.copy_side_files(out, folder.side_files(plan.inputs.base.folder, plan.inputs.adapter.folder))
    outputs = [FileRecord(file=name, **record) for name, record in journal.files.items()]
    report = make_report(plan, bench, records, outputs, predicted, measured, started)
    write_file(out / RECIPE_NAME, pinned(plan).to_yaml().encode())
    write_file(out / REPORT_NAME, (report.model_dump_json(indent=1) + "\n").encode())
    write_file(out / html.NAME, html.html_report(report).encode())
    write_file(out / "README.md", model_card(report, plan).encode())
    folder.write_json(out / "config.json", plan.config, sort_keys=True)
    journal.remove()
    return report


def write_shard(
    shard: Shard, out: Path, resume: bool, journal: Journal, bench: Bench, measured: dict[str, Sums], workers: int, watcher: Watcher
) -> ShardWriter:  # fmt: skip
    """One output file. What an earlier run left is kept where its bytes hash to what the journal says."""
    writer = ShardWriter(out / shard.file, shard.layout, resume)

    def work(step: Step) -> None:
        names = tuple(step.outputs)
        earlier = journal.steps.get(step.name)
        if earlier and earlier["sha256"].keys() == writer.fixed(names) and writer.matches(earlier["sha256"]):
            record = earlier
        else:
            sink = writer.step(names)
            sums = do(step, sink, bench)
            record = {"sha256": sink.finish(), "texts": sink.texts, "sums": sums}
            journal.step_done(step.name, record)
        writer.add_texts(record["texts"])
        if record["sums"] is not None:
            measured[step.name] = record["sums"]
        watcher.advance(step.weight.nbytes, step.name)

    try:
        threads.run(shard.steps, work, workers)
        record = writer.finish()
        journal.file_done(shard.file, record)
        writer.publish()
    finally:
        writer.close()
    return writer


def pinned(plan: Plan) -> Recipe:
    """The recipe with the commits that its revisions stood for, so that it makes the same model again."""
    inputs = plan.inputs
    commits = {
        "revision": inputs.base_source.commit,
        "adapter_revision": inputs.adapter_source.commit,
        "original_revision": inputs.original_source.commit if inputs.original_source else None,
    }
    return plan.recipe.model_copy(update={name: commit for name, commit in commits.items() if commit})


def identity(plan: Plan, bench: Bench, records: Sequence[InputRecord]) -> dict[str, Any]:
    """What a resumed run must share with the one it resumes."""
    return {
        "qmerge": version("qmerge"),
        "torch": torch.__version__,
        "device": bench.device.type,
        "recipe": plan.recipe.identity(),
        "input": {f"{r.role} {f.file}": f.sha256 for r in records for f in r.files},
        "output": {shard.file: len(shard.steps) for shard in plan.shards},
    }


def input_folders(inputs: Inputs) -> dict[str, Path]:
    folders = {"the base": inputs.base_source.folder, "the adapter": inputs.adapter_source.folder}
    return {**folders, "the original": inputs.original_source.folder} if inputs.original_source else folders


def input_records(inputs: Inputs, watcher: Watcher) -> list[InputRecord]:
    """SHA-256 of every file that the result depends on."""
    base_files = [*inputs.base.files, inputs.base.folder / "config.json"]
    adapter_files = [inputs.adapter.folder / "adapter_model.safetensors", inputs.adapter.folder / "adapter_config.json"]
    roles = [("base", inputs.base_source, base_files), ("adapter", inputs.adapter_source, adapter_files)]
    if inputs.original and inputs.original_source:
        roles.append(("original", inputs.original_source, list(inputs.original.files)))
    watcher.stage("hashing inputs", sum(path.stat().st_size for _, _, files in roles for path in files))
    records = []
    for role, source, files in roles:
        hashed = []
        for path in files:
            size = path.stat().st_size
            hashed.append(FileRecord(file=path.name, bytes=size, sha256=hash_file(path)))
            watcher.advance(size, path.name)
        records.append(
            InputRecord(role=role, name=source_name(source), id=source.id, commit=source.commit, files=hashed)
        )
    return records


def source_name(source: hub.Source) -> str:
    """The Hub id, or the last part of a local folder. (The recipe keeps paths as they were given, home as ``~``.)"""
    return source.id or source.folder.name


def reserved(out: Path) -> int:
    """Bytes that an unfinished run in ``out`` has taken already."""
    return sum(path.stat().st_size for path in out.glob("*.safetensors*")) if out.is_dir() else 0


def make_report(
    plan: Plan, bench: Bench, records: list[InputRecord], outputs: list[FileRecord], predicted: Sequence[Survival],
    measured: dict[str, Sums], started: float,
) -> ReportData:  # fmt: skip
    """Sums → values, per weight, per kind of module and in total; and the warnings about them."""
    weights, kinds = [], defaultdict(list)
    for step in plan.merged:
        values = values_of(measured[step.name])
        assert step.update is not None
        kinds[step.weight.module.rpartition(".")[2]].append(step.name)
        weights.append(
            WeightRecord(
                module=step.weight.module,
                shape=step.shape,
                base_format=base_format(step),
                target=step.target,
                rounding=plan.recipe.rounding,
                rank=step.update.rank,
                scale=step.update.scale,
                values=values,
            )
        )
    return ReportData(
        recipe=plan.recipe.portable(exclude_none=True, exclude={"out"}),
        versions=versions(),
        device=device_name(bench.device),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - started, 3),
        inputs=records,
        outputs=outputs,
        actions=dict(Counter(step.action for step in plan.steps)),
        predicted={"total": total_kept(predicted), **{s.module: s.kept for s in predicted}},
        total=group("all", [step.name for step in plan.merged], measured),
        groups=[group(kind, names, measured) for kind, names in kinds.items()],
        weights=weights,
        warnings=input_warnings(plan)
        + advice.warnings([survival(record, measured) for record in weights], predicted=False),
    )


def group(name: str, names: Sequence[str], measured: dict[str, Sums]) -> GroupRecord:
    return GroupRecord(name=name, weights=len(names), values=values_of(over_weights(measured[n] for n in names)))


def survival(record: WeightRecord, measured: dict[str, Sums]) -> Survival:
    """A measured weight, as the warnings want it."""
    v = record.values
    squared = measured[f"{record.module}.weight"]["kept"]["delta_delta"]
    return Survival(
        record.module, record.target, record.rounding, record.rank, v["kept"], v["noise"], v["relative_size"],
        v["gap_to_delta"], squared,
    )  # fmt: skip


def base_format(step: Step) -> str:
    return step.trained_on[0] if step.trained_on else step.weight.format


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() or "cpu"
