"""`qmerge inspect` of an adapter, for people."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

from rich.table import Table

from qmerge.recipe import AS_STORED
from qmerge.report.terminal.console import NotedTable, make_table, print_warning, safe, stderr, stdout, with_notes
from qmerge.report.terminal.model import formats_text, name_with_commit
from qmerge.wording import DASH, fixed_or_dash, size_text


def show_adapter(described: dict[str, Any]) -> None:
    """What ``describe_adapter`` found: results on stdout, warnings and the reason why it cannot be merged on stderr."""
    console = stdout()
    console.print(f"[bold]{safe(_heading(described))}[/bold]")
    for line in _setting_lines(described):
        console.print(safe(line))
    if described["modules"]:
        console.print(_modules_table(described["modules"]))
    if described.get("replaced"):
        console.print(safe(f"  replaced by trained values: {', '.join(described['replaced'])}"))
    if described.get("base"):
        _show_base(described)
    for line in described["suspicious"]:
        print_warning(line)
    if described["problem"]:
        stderr().print(f"[red]cannot be merged:[/red] {safe(described['problem'])}")


def _heading(described: dict[str, Any]) -> str:
    """The adapter's name; of a checkpoint, the run's name, too, and which of its checkpoints it is."""
    checkpoint = described["checkpoint"]
    if checkpoint is None:
        return str(described["name"])
    # Of a Hub id, the name has that of the run before #.
    name = described["name"].rpartition("#")[2]
    return f"{checkpoint['run']}: {name}, checkpoint {checkpoint['number']} of {checkpoint['of']}"


def _setting_lines(described: dict[str, Any]) -> list[str]:
    """The adapter's config and its size, a line each."""
    lines = [_setting(name, value) for name, value in described["config"].items()]
    training = described["training"]
    source = f" ({training['source']})" if training["source"] else ""
    lines.append(_setting("base in training", f"{_trained_on(training['quantization'])}{source}"))
    dtypes = ", ".join(described["dtypes"])
    lines.append(_setting("tensors", f"{described['tensors']} ({dtypes}), {size_text(described['bytes'])}"))
    if described.get("changes"):
        lines.append(_setting("changes", ", ".join(f"{n} {kind}" for kind, n in described["changes"].items())))
    if described["other_options"]:
        lines.append("other keys of adapter_config.json (not options of PEFT)")
        lines += [_setting(name, value) for name, value in described["other_options"].items()]
    return lines


def _trained_on(quantization: str | None) -> str:
    """How training quantized the base, in words."""
    if quantization is None:
        return "not known"
    return "not quantized" if quantization == AS_STORED else f"quantized to {quantization}"


def _setting(name: str, value: Any) -> str:
    return f"  {name:<26} {value}"


def _show_base(described: dict[str, Any]) -> None:
    """What adapter and base declare, side by side; and how the largest deltas relate to the base's weights."""
    base = described["base"]
    console = stdout()
    fingerprint = base["fingerprint"]["id"]
    console.print(safe(f"base     {name_with_commit(base)}: weights: {formats_text(base)}; fingerprint {fingerprint}"))
    console.print(_comparison_table(described["comparison"]))
    if described["alignments"]:
        console.print(_alignments_table(described["alignments"]))
    for remark in described["comparison"]:
        if remark["warning"]:
            print_warning(remark["warning"])


def _comparison_table(remarks: list[dict[str, str]]) -> Table:
    table = make_table("Was it trained on this base?", ())
    for name in ("", "the adapter says", "this base", "verdict"):
        table.add_column(name, overflow="fold")
    for remark in remarks:
        table.add_row(safe(remark["topic"]), safe(remark["said"]), safe(remark["given"]), safe(remark["verdict"]))
    return table


def _alignments_table(alignments: list[dict[str, Any]]) -> NotedTable:
    table = make_table("Do its largest deltas contain a part of the base?", ())
    table.add_column("module", overflow="fold")
    for name in ("rms(delta)", "cos(D, W)", "cos(D, W-NF4)"):
        table.add_column(name, justify="right")
    for alignment in alignments:
        table.add_row(
            safe(alignment["module"]),
            f"{alignment['rms']:.2e}",
            fixed_or_dash(alignment["to_base"], 3),
            fixed_or_dash(alignment["to_error"], 3),
        )
    notes = [
        ("rms(delta)", "typical size of a change to one weight entry; largest first"),
        ("cos(D, W)", "cosine of the delta and the base's weight"),
        ("cos(D, W-NF4)", "cosine of the delta and the weight's rounding error in NF4"),
    ]
    return with_notes(table, notes, ["On the right base, both cosines are near 0."])


def _modules_table(modules: list[dict[str, Any]]) -> NotedTable:
    """One row for each kind of module."""
    modules_of_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for module in modules:
        modules_of_kind[module["module"].rpartition(".")[2]].append(module)
    table = make_table("Deltas", ("modules", "number", "rank", "scale", "rms(delta)", "effective rank"))
    for kind, members in modules_of_kind.items():
        cells = [
            safe(kind),
            str(len(members)),
            _distinct(members, "rank", str),
            _distinct(members, "scale", "{:.3g}".format),
            _range(members, "rms", "{:.2e}".format),
            _range(members, "effective_rank", "{:.1f}".format),
        ]
        table.add_row(*cells)
    notes = [
        ("scale", "what the product of the factors is multiplied by (alpha / r)"),
        ("rms(delta)", "typical size of a change to one weight entry"),
        ("effective rank", "number of directions that carry the delta; at most the rank"),
    ]
    return with_notes(table, notes)


def _distinct(members: list[dict[str, Any]], key: str, formatter: Callable[[Any], str]) -> str:
    """All different values of one key, in ascending order."""
    return ", ".join(formatter(value) for value in sorted({member[key] for member in members}))


def _range(members: list[dict[str, Any]], key: str, formatter: Callable[[float], str]) -> str:
    """The smallest and the largest value of one key; only one where both read the same."""
    values = [member[key] for member in members if member[key] is not None]
    if not values:
        return DASH
    low = formatter(min(values))
    high = formatter(max(values))
    return low if low == high else f"{low} – {high}"
