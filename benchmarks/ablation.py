"""What each part of ``preserve`` brings, on the demo model: gain kept and KL ratio on held-out text.

    python benchmarks/ablation.py [--base DIR --adapter DIR --calibration FILE --text FILE]

Every row is a whole merge into the base's own format, judged by qmerge's fidelity (equal to transformers + peft to
four digits, tests/test_fidelity.py). Rows add one part each; the last ones say what calibrates.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import qmerge
import qmerge.demo
from qmerge.rounding import _metric, preserve

DEMO = Path(qmerge.demo.__file__).parent
PLAIN = {"sequential": False}
ONE, ALONE = {"ORDERS": 1}, {"READ": 0.0, "SPAN": 0.0}


@contextmanager
def changed(constants: dict[str, Any]) -> Iterator[None]:
    """Constants of the two modules, for one merge."""
    places = [(module, name) for module in (preserve, _metric) for name in constants if hasattr(module, name)]
    before = [getattr(module, name) for module, name in places]
    for module, name in places:
        setattr(module, name, constants[name])
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            setattr(module, name, value)


def rows(text: str) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, settings of the recipe, constants) of every row."""
    unchanged = {"compensate_delta_loss": lambda levels, *_: levels}
    same = {"rounding": "preserve", "calibration": text, "sequence_length": 128}
    return [
        ("nearest", {"rounding": "nearest"}, {}),
        ("stochastic", {"rounding": "stochastic"}, {}),
        ("feedback in H (GPTQ's)", {**same, **PLAIN}, {**ONE, **ALONE, "SWEEPS": 0, **unchanged}),
        ("+ descent", {**same, **PLAIN}, {**ONE, **ALONE, **unchanged}),
        ("+ P: what the adapter reads", {**same, **PLAIN}, {**ONE, "SPAN": 0.0, **unchanged}),
        ("+ S: errors along with it", {**same, **PLAIN}, {**ONE, **unchanged}),
        ("+ 4 orders of the columns", {**same, **PLAIN}, unchanged),
        ("+ aim past what is lost along the delta", {**same, **PLAIN}, {}),
        ("+ sequential (all of preserve)", same, {}),
        ("with 16 orders", same, {"ORDERS": 16}),
        ("on text that the adapter model writes", {**same, "calibration": "generate"}, {}),
        ("on random tokens (the default)", {**same, "calibration": "random"}, {}),
        ("without calibration", {**same, "calibration": "none"}, {}),
    ]


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", default=str(DEMO / "base-nf4"))
    asked.add_argument("--adapter", default=str(DEMO / "adapter"))
    asked.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    asked.add_argument("--text", default=str(DEMO / "heldout.txt"))
    given = asked.parse_args()
    inputs = {"base": given.base, "adapter": given.adapter, "target": "nf4", "quiet": True}
    print(
        "| rounding | kept | output kept | gain kept | KL ratio | codes changed | seconds |\n|---|---|---|---|---|---|---|"
    )
    for name, settings, constants in rows(given.calibration):
        with tempfile.TemporaryDirectory() as folder, changed(constants):
            started = time.monotonic()
            report = qmerge.merge(**inputs, **settings, out=f"{folder}/out")
            seconds = time.monotonic() - started
            found = qmerge.fidelity(out=f"{folder}/out", text=given.text, sequence_length=128, quiet=True)
        v = report.data.total.values
        seen = "–" if v["output_kept"] is None else f"{v['output_kept']:.2f}"
        judged = f"{found.gain_kept:.3f} | {found.kl_ratio:.4f}"
        print(
            f"| {name} | {v['kept']:.2f} | {seen} | {judged} | {v['codes_changed']:.1%} | {seconds:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
