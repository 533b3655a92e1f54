"""`qmerge plan`, for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qmerge.forecast.kinds import READ_WEIGHTS
from qmerge.forecast.targets import READ_WEIGHTS as TARGET_WEIGHTS
from qmerge.formats import get_format
from qmerge.formats.serving.programs import BITSANDBYTES, BITSANDBYTES_IN_VLLM
from qmerge.report.terminal.console import NotedTable, make_table, print_warning, safe, stdout, with_notes
from qmerge.report.terminal.model import formats_text, name_with_commit
from qmerge.report.terminal.tables import loader_lines, pair_line
from qmerge.schema import PairRecord
from qmerge.wording import DASH, counted, fixed_or_dash, kept_beside, share_or_dash, size_text, times


def show_plan(described: dict[str, Any], all_weights: bool) -> None:
    """What ``describe_plan`` found: results on stdout, warnings on stderr. ``all_weights`` lists every weight."""
    console = stdout()
    for line in [*_head_lines(described), *serve_lines(described["serve"])]:
        console.print(safe(line))
    if described["target"]:
        for line in _work_lines(described):
            console.print(safe(line))
        if all_weights:
            for weight in described["weights"]:
                console.print(safe(_weight_line(weight)))
    console.print(targets_table(described["targets"], for_any_program=described["serve"] is None))
    console.print(safe(_sample_line(described["predicted_from"])))
    for target in described["targets"]:
        if "impossible" in target:
            console.print(safe(f"{target['target']}: not possible: {target['impossible']}"))
    for line in described["warnings"]:
        print_warning(line)


def _head_lines(described: dict[str, Any]) -> list[str]:
    """Base and adapters, how alike several adapters are, and why ``--target auto`` chose this target."""
    base = described["base"]
    adapter = described["adapter"]
    ranks = ", ".join(str(rank) for rank in adapter["ranks"])
    lines = [
        f"base     {name_with_commit(base)}: {size_text(base['bytes'])}; weights: {formats_text(base)}",
        f"adapter  {name_with_commit(adapter)}: {adapter['kind']}, {counted(adapter['modules'], 'module')}, rank {ranks}",
    ]
    lines += described["notes"]
    lines += [pair_line(PairRecord(**pair)) for pair in described["interference"]]
    if described["why"]:
        lines.append(described["why"])
    return lines


def serve_lines(serve: dict[str, Any] | None) -> list[str]:
    """Which target to write for the program that will serve the model, how to start it, and what to know."""
    if serve is None:
        return []
    if serve["recommended"] is None:
        return [f"serve    with {serve['program']}: none of the targets that it loads is possible here."]
    others = [
        f"{size}: {serve[size]}" for size in ("8 bits", "16 bits") if serve[size] not in (None, serve["recommended"])
    ]
    more = f" ({'; '.join(others)})" if others else ""
    needs = f"; it needs {serve['needs']}" if serve["needs"] else ""
    lines = [f"with {serve['program']}: --target {serve['recommended']}{more}{needs}"]
    if serve["command"]:
        lines.append(f"then: {serve['command']}")
    lines += serve["remarks"]
    return [f"serve    {lines[0]}", *(f"         {line}" for line in lines[1:])]


def _work_lines(described: dict[str, Any]) -> list[str]:
    """What is done to the weights, and what the run needs."""
    actions = ", ".join(f"{count} {action}" for action, count in described["actions"].items())
    written = f"writes {size_text(described['bytes_out'])} in {counted(len(described['shards']), 'file')}"
    enough = "enough" if described["enough_disk"] else "NOT ENOUGH"
    memory = [
        f"{size_text(described['peak_memory'])} for weights",
        "about 0.6 GB for libraries",
    ]
    if described["calibration_memory"]:
        memory.insert(1, f"about {described['calibration_memory'] / 1e9:.1f} GB for calibration")
    return [
        f"target   {described['target']}; weights: {actions}",
        f"disk     reads {size_text(described['bytes_in'])}, {written}; {size_text(described['disk_free'])} free: {enough}",
        f"memory   {', '.join(memory)}",
    ]


def _weight_line(weight: dict[str, Any]) -> str:
    shape = "x".join(str(length) for length in weight["shape"])
    kept = share_or_dash(weight["predicted_kept"]) if weight["rank"] else ""
    return f"  {weight['action']:<8}{weight['from']:>5} → {weight['to']:<5}{shape:>12}{kept:>9}  {weight['name']}"


def targets_table(targets: list[dict[str, Any]], *, for_any_program: bool = True) -> NotedTable:
    """Targets side by side, as predicted for nearest rounding.

    Args:
        for_any_program: say which programs load them; otherwise, the user has named one.
    """
    title = "What nearest rounding would keep of the delta (predicted)"
    table = make_table(title, ("target", "bits", "size", "noise", "kept", "step/delta"))
    for target in targets:
        table.add_row(target["target"], *_target_cells(target))
    notes = [
        ("bits", "per weight, scales included"),
        ("noise", "rounding error; 1: as large as the delta, no better than the base"),
        ("kept", "share of the delta; 133 %: too much; (75 %): the noise is larger"),
        ("step/delta", "distance between neighbouring levels, relative to the delta"),
    ]
    names = [target["target"] for target in targets]
    lines = [
        "Where nearest loses much, the default rounds with preserve, which keeps more:",
        "a merge, or `qmerge measure`, says how much.",
    ]
    if for_any_program:
        lines += [*loader_lines(names), *bitsandbytes_lines(names), *gguf_lines(names)]
    return with_notes(table, notes, [*lines, *activation_lines(names)])


def _sample_line(predicted_from: dict[str, int]) -> str:
    """From how many weights the numbers were predicted."""
    weights = counted(predicted_from["of"], "weight")
    line = f"predicted from {predicted_from['targets']} of {weights}, up to {TARGET_WEIGHTS} of each kind of module"
    if "weights" in predicted_from:
        line += f"; kept of each weight: from {predicted_from['weights']}, up to {READ_WEIGHTS} of each kind"
    return line


def bitsandbytes_lines(targets: Sequence[str]) -> list[str]:
    """What to know before a model in a format of bitsandbytes is made for vLLM."""
    names = [target for target in targets if target in BITSANDBYTES]
    if not names:
        return []
    return [f"{', '.join(names)}: {BITSANDBYTES_IN_VLLM.partition(';')[0]}"]


def gguf_lines(targets: Sequence[str]) -> list[str]:
    """How to see GGUF files, which are predicted only when asked for: llama.cpp's converter takes seconds."""
    if any(get_format(target).info.container for target in targets):
        return []
    return ["GGUF files for llama.cpp, Ollama, LM Studio: --for ollama, or --target q4_k_m"]


def activation_lines(targets: Sequence[str]) -> list[str]:
    """Targets whose loaders quantize more than the numbers are about."""
    names = [target for target in targets if get_format(target).info.quantizes_activations]
    if not names:
        return []
    return [f"{', '.join(names)}: loaders quantize activations, too, which no number includes"]


def _target_cells(target: dict[str, Any]) -> list[str]:
    if "impossible" in target:
        return [DASH] * 5
    gap = target["gap_to_delta"]
    return [
        f"{target['bits_per_weight']:.3g}",
        size_text(target["bytes_out"]),
        fixed_or_dash(target["predicted_noise"], 2),
        kept_beside(target["predicted_noise"], target["predicted_kept"]),
        DASH if gap is None else times(gap),
    ]
