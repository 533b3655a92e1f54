"""`qmerge inspect`: what an adapter is, what it needs, and what is suspicious; no base is read."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from qmerge.adapters._folder import TENSORS, config_file, of_one, read_adapter, tensor_infos
from qmerge.adapters._named import find
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.scan import read_json
from qmerge.errors import AdapterError
from qmerge.report.terminal import err, out, printable
from qmerge.types import Update

SHOWN = (
    "peft_type", "peft_version", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora", "rank_pattern",
    "alpha_pattern", "init_lora_weights", "fan_in_fan_out", "unsloth_training_method",
)  # fmt: skip
CLOSE_TO_ZERO = 1e-8


def describe(reference: str, revision: str | None) -> dict[str, Any]:
    """Everything that the folder tells, also where the adapter cannot be merged (``problem`` then says why)."""
    source = find(reference, revision)
    config = read_json(config_file(source.folder), AdapterError)
    infos = of_one(tensor_infos(source.folder), source.adapter)
    described: dict[str, Any] = {
        "name": source.name,
        "commit": source.commit,
        "config": {name: config[name] for name in SHOWN if config.get(name) not in (None, {}, [])},
        "file": TENSORS,
        "tensors": len(infos),
        "bytes": sum(info.nbytes for info in infos.values()),
        "dtypes": sorted({info.dtype for info in infos.values()}),
        "problem": None,
        "modules": [],
        "suspicious": [],
    }
    try:
        with Reader() as reader:
            adapter = read_adapter(source.folder, reader, source.adapter)
    except AdapterError as error:
        return {**described, "problem": str(error)}
    modules = [describe_module(name.removesuffix(".weight"), update) for name, update in adapter.updates.items()]
    more = {"kind": adapter.kind, "modules": modules, "replaced": list(adapter.replaced)}
    return {**described, **more, "suspicious": suspicious(modules, config)}


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
        console.print(escape(printable(f"  {name:<26} {value}")))
    console.print(
        f"  {'tensors':<26} {described['tensors']} ({', '.join(described['dtypes'])}), {described['bytes']} bytes"
    )
    if described["modules"]:
        console.print(modules_table(described["modules"]))
    if described.get("replaced"):
        console.print(escape(printable(f"  trained whole: {', '.join(described['replaced'])}")))
    for line in described["suspicious"]:
        err().print(f"[yellow]warning:[/yellow] {escape(printable(line))}")
    if described["problem"]:
        err().print(f"[red]cannot be merged:[/red] {escape(printable(described['problem']))}")


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
