"""`qmerge inspect`: what an adapter is, what it says it was trained on, and what is suspicious; with a base, whether it is
the one (names, and a few rows of a few weights)."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from qmerge import hub
from qmerge.adapters.lora import is_embedding
from qmerge.adapters.reading.folder import TENSORS, Adapter, config_file, of_one, read_adapter, tensor_infos
from qmerge.adapters.updates.experts import StackUpdate
from qmerge.adapters.updates.initializations import ChangedBaseUpdate
from qmerge.adapters.updates.lora import AddUpdate, DoraUpdate, LoraUpdate, OwnBaseUpdate, TokenRowsUpdate
from qmerge.adapters.updates.variants import ByWidth
from qmerge.base_check import declared, deltas
from qmerge.checkpoint.scan import read_json, scan
from qmerge.errors import AdapterError, CheckpointError, NeedsBaseError, QmergeError
from qmerge.planning.inputs import read_inputs
from qmerge.planning.plan import make_run_context, plan_from
from qmerge.recipe import Recipe, make_recipe
from qmerge.report.plan import describe_base, name_of
from qmerge.report.records import fingerprint_record
from qmerge.report.terminal import err, out, printable
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Update
from qmerge.wording import percent

SHOWN = (
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "unsloth_training_method",
)  # fmt: skip
CLOSE_TO_ZERO = 1e-8


def describe(source: hub.Source, base: str | None = None, base_revision: str | None = None) -> dict[str, Any]:
    """Everything that the folder tells, also where the adapter cannot be merged (``problem`` then says why).

    Args:
        base: a model to compare it with.

    Raises:
        AdapterError, CheckpointError: there is no adapter, or no model, to look at.
    """
    config = read_json(config_file(source.folder), AdapterError)
    infos = of_one(tensor_infos(source.folder), source.adapter)
    described: dict[str, Any] = {
        "name": source.name,
        "commit": source.commit,
        "config": {name: config[name] for name in SHOWN if config.get(name) not in (None, {}, [])},
        "other_options": {n: value for n, value in declared.other_options(config).items() if n not in SHOWN},
        "file": TENSORS,
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": sorted({info.dtype for info in infos.values()}),
        "problem": None,
        "modules": [],
        "suspicious": [],
    }
    if base is not None:
        name = f"#{source.adapter}" if source.adapter and source.adapters_folder is None else ""
        settings = {"base": base, "revision": base_revision, "adapter": f"{source.folder}{name}", "target": "fp32"}
        return described | beside(make_recipe(settings), source, config)
    try:
        with Reader() as reader:
            return described | filled(read_adapter(source.folder, reader, source.adapter), config)
    except NeedsBaseError as error:
        return {**described, "suspicious": [f"{error}: give --base"]}
    except AdapterError as error:
        return {**described, "problem": str(error)}


def filled(adapter: Adapter, config: dict[str, Any]) -> dict[str, Any]:
    modules = [describe_module(name.removesuffix(".weight"), update) for name, update in adapter.updates.items()]
    return {
        "kind": adapter.kind,
        "changes": changes(adapter),
        "modules": modules,
        "replaced": list(adapter.replaced),
        "suspicious": suspicious(modules, config),
    }


def beside(recipe: Recipe, adapter: hub.Source, config: dict[str, Any]) -> dict[str, Any]:
    """The adapter against a base: what both say, and what the numbers say where it could be merged."""
    with Reader() as reader:
        source = hub.resolve(recipe.base, recipe.revision, CheckpointError)
        base = scan(source.folder, reader)
        remarks = declared.compare(config, declared.given(source, base, recipe, [adapter]))
        found: dict[str, Any] = {
            "base": {**describe_base(source, base), "fingerprint": fingerprint_record(base.folder).model_dump()},
            "comparison": [asdict(remark) for remark in remarks],
            "alignments": [],
        }
        try:
            inputs = read_inputs(recipe, reader)
            found |= filled(inputs.adapter, config)
            plan = plan_from(recipe, inputs)
            (alignments,) = deltas.look(plan, make_run_context(plan, reader))
            found["alignments"] = [asdict(alignment) for alignment in alignments]
            found["problem"] = deltas.verdict(alignments, recipe.merge_onto)
        except QmergeError as error:  # it does not fit this base: what both say still helps
            found["problem"] = str(error)
        return found


def changes(adapter: Adapter) -> dict[str, int]:
    """Kind of change → how many tensors of the base it is made to."""
    kinds = Counter(kind_of_change(name, update) for name, update in adapter.updates.items())
    kinds += Counter("biases, trained" if name.endswith(".bias") else "trained whole" for name in adapter.replaced)
    return dict(kinds)


def kind_of_change(name: str, update: Update) -> str:
    if isinstance(update, OwnBaseUpdate):
        return kind_of_change(name, update.update)
    if isinstance(update, LoraUpdate | ByWidth):
        return "LoRA of embeddings" if is_embedding(name) else "LoRA"
    kinds = {
        DoraUpdate: "DoRA", TokenRowsUpdate: "token rows", AddUpdate: "biases, added to", StackUpdate: "LoRA of experts",
        ChangedBaseUpdate: "LoRA on a base that its start changed",
    }  # fmt: skip
    return next((kind for of, kind in kinds.items() if isinstance(update, of)), "other updates")


def describe_module(name: str, update: Update) -> dict[str, Any]:
    """``rms`` of the delta's entries; ``effective_rank``: exp of the entropy of its squared singular values."""
    directions, norms_O = update.directions(), update.row_norms()
    singular_R = directions[1] if directions else torch.empty(0)
    return {
        "module": name,
        "shape": list(update.shape),
        "rank": update.rank,
        "scale": update.scale,
        "rms": None if norms_O is None else float(norms_O.square().sum()) ** 0.5 / math.sqrt(math.prod(update.shape)),
        "effective_rank": effective_rank(singular_R) if directions else None,
        "largest_singular": float(singular_R.max()) if len(singular_R) else None,
    }


def effective_rank(singular_R: Tensor) -> float:
    """1 when one direction carries everything, R when all carry the same (Roy and Vetterli, 2007); 0 for zero."""
    squares = singular_R.double().square()
    if not float(squares.sum()):
        return 0.0
    shares = squares / squares.sum()
    return math.exp(float(-(shares * shares.clamp(min=1e-300).log()).sum()))


def suspicious(modules: list[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    """What a user should look at before merging."""
    lines = []
    dead = [m["module"] for m in modules if m["rms"] is not None and m["rms"] < CLOSE_TO_ZERO]
    if dead:
        lines.append(
            f"{len(dead)} of {len(modules)} modules have a delta of zero, the first is {dead[0]}: never trained?"
        )
    loud = [m for m in modules if m["scale"] > 8]
    if loud:
        lines.append(f"{loud[0]['module']} has scale {loud[0]['scale']:.3g} (alpha / r); usual are 0.5 to 4")
    if not config.get("base_model_name_or_path"):
        lines.append("adapter_config.json does not name the base that it was trained on")
    return lines


def show(described: dict[str, Any]) -> None:
    console = out()
    console.print(f"[bold]{escape(printable(described['name']))}[/bold]")
    for name, value in described["config"].items():
        console.print(setting(name, value))
    console.print(
        f"  {'tensors':<26} {described['tensors']} ({', '.join(described['dtypes'])}), {described['bytes']} bytes"
    )
    if described.get("changes"):
        console.print(setting("changes", ", ".join(f"{n} {kind}" for kind, n in described["changes"].items())))
    if described["other_options"]:
        console.print("also in adapter_config.json (no options of PEFT)")
        for name, value in described["other_options"].items():
            console.print(setting(name, value))
    if described["modules"]:
        console.print(modules_table(described["modules"]))
    if described.get("replaced"):
        console.print(escape(printable(f"  trained whole: {', '.join(described['replaced'])}")))
    if described.get("base"):
        show_base(described)
    for line in described["suspicious"]:
        err().print(f"[yellow]warning:[/yellow] {escape(printable(line))}")
    if described["problem"]:
        err().print(f"[red]cannot be merged:[/red] {escape(printable(described['problem']))}")


def setting(name: str, value: Any) -> str:
    return escape(printable(f"  {name:<26} {value}"))


def show_base(described: dict[str, Any]) -> None:
    """What the adapter says of its base, beside the base that is given; and the cosines."""
    base, console = described["base"], out()
    formats = ", ".join(f"{count} {name}" for name, count in base["formats"].items())
    console.print(f"base     {name_of(base)}: weights: {formats}; fingerprint {base['fingerprint']['id']}")
    table = Table(title="Was it trained on this base?", title_justify="left", title_style="bold")
    for name in ("", "the adapter says", "this base", "verdict"):
        table.add_column(name, overflow="fold")
    for remark in described["comparison"]:
        table.add_row(*(escape(printable(remark[name])) for name in ("topic", "said", "given", "verdict")))
    console.print(table)
    if described["alignments"]:
        console.print(alignments_table(described["alignments"]))
    for remark in described["comparison"]:
        if remark["warning"]:
            err().print(f"[yellow]warning:[/yellow] {escape(printable(remark['warning']))}")


def alignments_table(alignments: list[dict[str, Any]]) -> Table:
    table = Table(title="What its largest deltas say", title_justify="left", title_style="bold")
    table.add_column("module", overflow="fold")
    for name in ("delta", "cos(D, W)", "cos(D, W-NF4)"):
        table.add_column(name, justify="right")
    for a in alignments:
        cosines = ("–" if a[name] is None else f"{a[name]:.3f}" for name in ("to_base", "to_error"))
        size = "–" if a["relative_size"] is None else percent(a["relative_size"])
        table.add_row(escape(printable(a["module"])), size, *cosines)
    table.caption = "delta: of the weight; both cosines are near 0 on the right base"
    table.caption_justify = "left"
    return table


def modules_table(modules: list[dict[str, Any]]) -> Table:
    """By last part of the module name."""
    groups: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for module in modules:
        groups[module["module"].rpartition(".")[2]].append(module)
    table = Table(title="Deltas", title_justify="left", title_style="bold")
    table.add_column("modules")
    for name in ("number", "rank", "scale", "rms(delta)", "effective rank"):
        table.add_column(name, justify="right")
    for name, members in groups.items():
        ranks, scales = sorted({m["rank"] for m in members}), sorted({m["scale"] for m in members})
        rms = [m["rms"] for m in members if m["rms"] is not None]
        effective = [m["effective_rank"] for m in members if m["effective_rank"] is not None]
        table.add_row(
            escape(printable(name)), str(len(members)), ", ".join(map(str, ranks)), ", ".join(f"{s:.3g}" for s in scales),
            span(rms, ".2e"), span(effective, ".1f"),
        )  # fmt: skip
    return table


def span(values: list[float], form: str) -> str:
    if not values:
        return "–"
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} – {high}"
