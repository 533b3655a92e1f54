"""The files that make a folder with weights a model: tokenizer, index, recipe, reports, config."""

from __future__ import annotations

from pathlib import Path

from qmerge.base_check.from_training import recorded
from qmerge.checkpoint import folder
from qmerge.checkpoint.scan import INDEX
from qmerge.evaluation.fidelity import fidelity
from qmerge.formats import get_target
from qmerge.gguf.modelfile import modelfile
from qmerge.planning.inputs import Inputs
from qmerge.planning.plan import Plan
from qmerge.progress import Progress
from qmerge.recipe import JUDGED_TOKENS, Recipe
from qmerge.report import html
from qmerge.report.card import model_card
from qmerge.report.loading import CARD_NAME
from qmerge.report.make import make_report
from qmerge.report.output_record import content_record, file_record, write_record
from qmerge.run.residual import FOLDER as RESIDUAL_FOLDER
from qmerge.run.residual import write_residuals
from qmerge.run.state import Run, Written
from qmerge.safetensors_io.disk import write_file
from qmerge.schema import RECIPE_NAME, FileRecord, ReportData
from qmerge.weights.context import RunContext


def complete_model(run: Run, written: Written) -> ReportData:
    """Write everything except the weights. config.json comes last, because a folder without it does not load as a model."""
    plan, out = run.plan, run.out
    names = _write_companions(run, written)
    report = make_report(
        plan,
        device=written.device,
        records=written.records,
        outputs=[FileRecord(file=name, **written.files[name]) for name in sorted(written.files)],
        preflight=run.preflight,
        outcomes=written.outcomes,
        fidelity=written.fidelity,
        started=run.started,
    )
    if run.recipe.residual and written.residuals:
        report.residual = write_residuals(out, written.residuals, run.recipe.residual)
        names += [path.relative_to(out).as_posix() for path in (out / RESIDUAL_FOLDER).iterdir()]
    recipe = recorded(with_commits(run.recipe, plan.inputs), plan.inputs).to_yaml()
    contents = {RECIPE_NAME: recipe.encode(), **_pages(report, plan)}
    # Computed before the record, which has their hashes, and written after it.
    configs = {} if plan.is_gguf else config_files(plan)
    others = [file_record(out, name) for name in names]
    others += [content_record(name, content) for name, content in configs.items()]
    report = write_record(out, report, contents, others)
    # The record is complete now; without config.json the folder is not a model yet.
    for name, content in configs.items():
        write_file(out / name, content)
    return report


def _write_companions(run: Run, written: Written) -> list[str]:
    """Write the files that loaders read next to the weights, except configs; returns their names."""
    plan, out = run.plan, run.out
    if plan.is_gguf:  # the file has everything in it
        name = "Modelfile"
        write_file(out / name, modelfile(out / plan.shards[0].file).encode())
        return [name]
    folder.write_index(out, {shard.file: shard.layout for shard in plan.shards}, written.texts)
    files = folder.side_files(plan.inputs.base.folder, plan.inputs.adapter_files_folder)
    folder.copy_side_files(out, files)
    return [*files, INDEX] if len(plan.shards) > 1 else [*files]


def _pages(report: ReportData, plan: Plan) -> dict[str, bytes]:
    """The report as a page, and the model card."""
    return {html.NAME: html.html_report(report).encode(), CARD_NAME: model_card(report, plan).encode()}


def config_files(plan: Plan) -> dict[str, bytes]:
    """Name → content of config.json, which is the last one, and of other files that the target's loaders read."""
    quantization = plan.config.get("quantization_config") or {}
    files: dict[str, bytes] = {}
    for name, content in get_target(plan.target).side_files(quantization).items():
        files[name] = folder.json_bytes(content)
    files["config.json"] = folder.json_bytes(folder.without_local_paths(plan.config), sort_keys=True)
    return files


def add_fidelity(report: ReportData, recipe: Recipe, plan: Plan, context: RunContext, progress: Progress) -> ReportData:
    """Judge the finished model on the recipe's text, and write its reports again. The model stays, whatever happens."""
    out, text = Path(recipe.out or "").expanduser(), Path(recipe.verify or "").expanduser()
    progress.stage("measuring the merged model", 1)
    try:
        record = fidelity(
            out,
            recipe,
            text,
            device=context.device,
            tokens=JUDGED_TOKENS,
            length=recipe.sequence_length,
            continuations=recipe.quoted_beginnings,
            report_progress=progress.report,
        )
        report = report.model_copy(update={"fidelity": record})
        return write_record(out, report, _pages(report, plan))
    finally:
        progress.end()


def with_commits(recipe: Recipe, inputs: Inputs) -> Recipe:
    """The recipe with the commits that its revisions resolved to, so that it makes the same model again."""
    commits = {"revision": inputs.base_source.commit}
    if len(inputs.adapter_sources) == 1:
        # One revision is for all adapters, so it cannot name the commits of several.
        commits["adapter_revision"] = inputs.adapter_source.commit
    if inputs.original_source:
        commits["original_revision"] = inputs.original_source.commit
    return recipe.model_copy(update={name: commit for name, commit in commits.items() if commit})
