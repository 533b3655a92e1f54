"""How much each part of ``preserve`` contributes, on the demo model.

    python benchmarks/ablation.py [--base DIR] [--adapter DIR] [--calibration FILE] [--text FILE] [--rows N]

Measures gain kept and KL ratio on held-out text, against the base and the unmerged adapter model, for ``nearest``,
``stochastic``, and ``preserve`` with one more part in every row; the last rows compare calibration texts. Every row is a
complete merge into NF4. The judge is ``qmerge.fidelity``, which agrees with transformers and peft to four digits
(tests/evaluation/test_fidelity.py). Takes some minutes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qmerge
import qmerge.demo
from qmerge.rounding import _objective, preserve

DEMO = Path(qmerge.demo.__file__).parent
HEADER = (
    "| rounding | kept | output kept | gain kept | KL ratio | codes changed | seconds |\n|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Variant:
    """One row: settings of the merge, and constants of ``preserve`` and its objective that are replaced for it."""

    name: str
    settings: Mapping[str, Any]
    constants: Mapping[str, Any] = field(default_factory=dict)


def variants(calibration: str) -> list[Variant]:
    """All rows. A part is switched off by its constant: a factor of 0, endless damping, a function that changes nothing."""
    whole = {"rounding": "preserve", "calibration": calibration, "sequence_length": 128}
    parallel = {**whole, "sequential": False}
    no_read = {"READ": 0.0}
    no_compensation = {"compensate_delta_loss": lambda levels_IO, *_: levels_IO}
    no_stream = {"COMPENSATION_DAMPING": 1e9}
    return [
        Variant("nearest", {"rounding": "nearest"}),
        Variant("stochastic", {"rounding": "stochastic"}),
        Variant("feedback and descent in H", parallel, {**no_read, **no_compensation}),
        Variant("+ P: what the adapter reads", parallel, no_compensation),
        Variant("+ aim past what is lost along the delta", parallel),
        Variant("+ sequential", whole, no_stream),
        Variant("+ the residual stream (all of preserve)", whole),
        Variant("with --effort fast", {**whole, "effort": "fast"}),
        Variant("with --effort best", {**whole, "effort": "best"}),
        Variant("on text that the adapter model writes", {**whole, "calibration": "generate"}),
        Variant("on random tokens", {**whole, "calibration": "random"}),
        Variant("without calibration", {**whole, "calibration": "none"}),
    ]


@contextmanager
def replaced(constants: Mapping[str, Any]) -> Iterator[None]:
    """Other values for constants of the two modules, for one merge."""
    before = []
    for name, value in constants.items():
        module = preserve if hasattr(preserve, name) else _objective
        before.append((module, name, getattr(module, name)))
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def table_row(variant: Variant, given: argparse.Namespace) -> str:
    """Merge, judge, and format one row."""
    with tempfile.TemporaryDirectory() as folder, replaced(variant.constants):
        out = f"{folder}/out"
        started = time.monotonic()
        report = qmerge.merge(
            base=given.base, adapter=given.adapter, target="nf4", out=out, quiet=True, **variant.settings
        )  # fmt: skip
        seconds = time.monotonic() - started
        fidelity = qmerge.fidelity(out=out, text=given.text, sequence_length=128, quiet=True)
    values = report.data.total.values
    output_kept = "–"  # not measured without calibration
    if values["output_kept"] is not None:
        output_kept = f"{values['output_kept']:.2f}"
    cells = [
        variant.name,
        f"{values['kept']:.2f}",
        output_kept,
        f"{fidelity.gain_kept:.3f}",
        f"{fidelity.kl_ratio:.4f}",
        f"{values['codes_changed']:.1%}",
        f"{seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(DEMO / "base-nf4"))
    parser.add_argument("--adapter", default=str(DEMO / "adapter"))
    parser.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    parser.add_argument("--text", default=str(DEMO / "heldout.txt"))
    parser.add_argument("--rows", type=int, help="print the first rows only (default: all)")
    given = parser.parse_args()
    print(HEADER)
    for variant in variants(given.calibration)[: given.rows]:
        print(table_row(variant, given), flush=True)


if __name__ == "__main__":
    main()
