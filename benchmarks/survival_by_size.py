"""What survives against how large the delta is: the demo adapter, made smaller and larger, merged into NF4.

    python benchmarks/survival_by_size.py [--svg docs/survival.svg]

Prints a table (KL ratio on held-out text: 0 predicts as the adapter model, 1 as the base) and draws it.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import qmerge
import qmerge.demo

DEMO = Path(qmerge.demo.__file__).parent
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
COLOURS = {"nearest": "#c0392b", "stochastic": "#d08700", "preserve": "#2563a8"}
TEXT = {"calibration": str(DEMO / "calibration.txt"), "sequence_length": 128}
LEGEND = {"nearest": "round to nearest", "stochastic": "stochastic", "preserve": "preserve"}
LEFT, TOP, WIDTH, HEIGHT = 130, 40, 560, 260
DARK, GREY = "#223", "#556"
TYPICAL = 0.01
"""Deltas of short QLoRA runs are 0.1 % to 1 % of the weights."""


def adapter_of(folder: Path, factor: float) -> Path:
    """The demo adapter with another alpha."""
    path = shutil.copytree(DEMO / "adapter", folder / f"adapter-{factor}")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": factor * config["lora_alpha"]}))
    return path


def measured(folder: Path, factor: float, rounding: str) -> tuple[float, float]:
    """(rms(delta) / rms(weight), KL ratio)."""
    adapter, out = adapter_of(folder, factor), folder / f"{rounding}-{factor}"
    more = TEXT if rounding == "preserve" else {}
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(adapter), "target": "nf4", "rounding": rounding}
    report = qmerge.merge(**inputs, **more, out=str(out), quiet=True)
    record = qmerge.fidelity(
        out=str(out), text=str(DEMO / "heldout.txt"), tokens=16384, sequence_length=128, quiet=True
    )
    shutil.rmtree(adapter)
    size = report.data.total.values["relative_size"]
    assert size is not None and record.kl_ratio is not None
    return size, record.kl_ratio


def svg(found: dict[str, list[tuple[float, float]]]) -> str:
    """Sizes on a logarithmic axis, 0.3 % to 15 %."""
    low, high = math.log10(0.003), math.log10(0.15)

    def position(size: float, ratio: float) -> tuple[float, float]:
        x = LEFT + (math.log10(size) - low) / (high - low) * WIDTH
        return x, TOP + (1 - min(ratio, 1.05)) * HEIGHT

    width, bottom = LEFT + WIDTH + 150, TOP + HEIGHT
    typical = position(TYPICAL, 0)[0]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 60}" font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{bottom + 60}" fill="white"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{typical - LEFT:.1f}" height="{HEIGHT}" fill="#eef1f7"/>',
        text(LEFT + 10, TOP + 94, "← short QLoRA runs:"),
        text(LEFT + 10, TOP + 111, "0.1 % to 1 %"),
    ]
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = position(0.01, ratio)[1]
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dde"/>')
        label = {0.0: "adapter model = 0", 1.0: "base model = 1"}.get(ratio, f"{ratio:g}")
        parts.append(text(LEFT - 8, y + 4, label, anchor="end"))
    for size in (0.003, 0.01, 0.03, 0.1):
        label = f"{100 * size:g} %"
        parts.append(text(position(size, 0)[0], bottom + 20, label, anchor="middle"))
    for name, points in found.items():
        pixels = [position(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[name]}"/>' for x, y in pixels]
    for i, name in enumerate(found):
        y = TOP + 32 + 24 * i
        parts.append(f'<circle cx="{LEFT + WIDTH + 18}" cy="{y - 4}" r="5" fill="{COLOURS[name]}"/>')
        parts.append(text(LEFT + WIDTH + 30, y, LEGEND[name], size=13, colour=DARK))
    parts.append(
        text(
            LEFT + WIDTH / 2,
            bottom + 48,
            "size of the delta, in % of the weights (rms)",
            size=13,
            colour=DARK,
            anchor="middle",
        )
    )
    title = "Does the merged NF4 model predict like the base or like the adapter model? (KL ratio)"
    parts.append(text(LEFT, 20, title, size=14, colour=DARK))
    return "\n".join([*parts, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, size: int = 12, colour: str = GREY, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--svg", type=Path)
    given = asked.parse_args()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in COLOURS}
    print(f"| delta | {' | '.join(COLOURS)} |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for factor in FACTORS:
            row = {name: measured(Path(folder), factor, name) for name in COLOURS}
            for name, point in row.items():
                found[name].append(point)
            print(
                f"| {row['nearest'][0]:.1%} | {' | '.join(f'{ratio:.4f}' for _, ratio in row.values())} |", flush=True
            )
    if given.svg:
        given.svg.write_text(svg(found))


if __name__ == "__main__":
    main()
