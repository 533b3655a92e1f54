"""`qmerge inspect` of a model, for people."""

from __future__ import annotations

from typing import Any

from qmerge.report.terminal.console import safe, stdout
from qmerge.wording import size_text


def show_model(described: dict[str, Any]) -> None:
    """What ``describe_model`` found, on stdout."""
    console = stdout()
    console.print(f"[bold]{safe(name_with_commit(described))}[/bold]")
    lines = {
        "architecture": ", ".join(str(name) for name in described["architectures"]) or "not named in config.json",
        "weights": f"{size_text(described['bytes'])}: {formats_text(described)}",
        "fingerprint": described["fingerprint"]["id"],
    }
    for name, value in lines.items():
        console.print(safe(f"  {name:<13} {value}"))
    for role, source in described["made_of"].items():
        line = f"  made of {role}: {name_with_commit(source)}"
        if source["fingerprint"]:
            line += f", fingerprint {source['fingerprint']}"
        console.print(safe(line))


def name_with_commit(described: dict[str, Any]) -> str:
    """``owner/name at 0123456789ab``; the name alone for a local folder."""
    if described["commit"]:
        return f"{described['name']} at {described['commit'][:12]}"
    return str(described["name"])


def formats_text(described: dict[str, Any]) -> str:
    """``11 fp32, 28 nf4``: how many weights are stored in which format."""
    return ", ".join(f"{count} {name}" for name, count in described["formats"].items())
