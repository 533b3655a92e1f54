"""What the walk found out about an architecture, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

OK = "ok"
REFUSED = "refused"
UNBUILT = "unbuilt"
WRONG = "WRONG"
CRASH = "crash"


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        head, model_type, class_name: see ``Architecture``.
        fp32: the verdict on the merge into fp32: ``ok``, ``refused`` (by qmerge), ``unbuilt`` (the stock libraries cannot
            do it), ``WRONG`` or ``crash``.
        nf4: the same for nf4; empty where fp32 is not ``ok``.
        error: the largest relative distance of an output in fp32; None where the model was not run.
        notes: a reason for each verdict that is not ``ok``.
    """

    head: str
    model_type: str
    class_name: str
    fp32: str = ""
    nf4: str = ""
    error: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.head}:{self.model_type}"


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """Name → its last outcome in a file with one outcome per line."""
    if not path.exists():
        return {}
    outcomes = (Outcome(**json.loads(line)) for line in path.read_text().splitlines())
    return {outcome.name: outcome for outcome in outcomes}


def append_outcomes(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Add outcomes to the end of the file."""
    with path.open("a") as file:
        for outcome in outcomes:
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
