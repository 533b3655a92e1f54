"""`qmerge inspect` of a model: how it is stored, which one it is (its fingerprint), and what it was made of, where qmerge made
it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.markup import escape

from qmerge.adapters.reading.folder import CONFIG
from qmerge.checkpoint.scan import scan
from qmerge.hub import Source
from qmerge.report.plan import describe_base, name_of
from qmerge.report.records import fingerprint_record
from qmerge.report.terminal import out, printable, size_text
from qmerge.safetensors_io.reader import Reader
from qmerge.schema import NAME, InputRecord, numbered, read_report


def is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and not (folder / CONFIG).exists()


def describe(source: Source) -> dict[str, Any]:
    """Raises:
    CheckpointError: it is damaged, or stored in an unknown way; its qmerge.json cannot be read.
    """
    with Reader() as reader:
        model = scan(source.folder, reader)
    report = read_report(source.folder) if (source.folder / NAME).is_file() else None
    return {
        **describe_base(source, model),
        "architectures": model.config.get("architectures") or [],
        "fingerprint": fingerprint_record(source.folder).model_dump(),
        "made_of": {role: made_of(record) for role, record in numbered(report.inputs)} if report else {},
    }


def made_of(record: InputRecord) -> dict[str, Any]:
    mark = record.fingerprint
    return {"name": record.name, "commit": record.commit, "fingerprint": mark.id if mark else None}


def show(described: dict[str, Any]) -> None:
    console = out()
    formats = ", ".join(f"{count} {name}" for name, count in described["formats"].items())
    console.print(f"[bold]{name_of(described)}[/bold]")
    lines = {
        "architecture": ", ".join(map(str, described["architectures"])) or "not named",
        "weights": f"{size_text(described['bytes'])}: {formats}",
        "fingerprint": described["fingerprint"]["id"],
    }
    for name, line in lines.items():
        console.print(escape(printable(f"  {name:<13} {line}")))
    for role, made in described["made_of"].items():
        which = f", fingerprint {made['fingerprint']}" if made["fingerprint"] else ""
        console.print(f"  made of {role}: {name_of(made)}{which}")
