"""How well a merge into NF4 keeps deltas of different sizes, for every rounding.

    python benchmarks/survival_by_size.py [--svg docs/survival.svg] [--factors 0.25 0.5 1 2 4 8]

Measures the KL ratio on held-out text (0: predicts like the adapter model, 1: like the base) of the demo adapter, made smaller
and larger by its alpha. Prints a table and draws it. Takes some minutes.
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
LEGEND = {"nearest": "round to nearest", "stochastic": "stochastic", "preserve": "preserve"}
COLOURS = {"nearest": "#c0392b", "stochastic": "#d08700", "preserve": "#2563a8"}

# The drawing, in pixels, and its colours.
LEFT, TOP, WIDTH, HEIGHT = 130, 40, 560, 260
RIGHT_MARGIN, BOTTOM_MARGIN = 150, 60
DARK, GREY = "#223", "#556"

SMALLEST, LARGEST = 0.003, 0.15
"""Ends of the axis of sizes, which is logarithmic."""

SHORT_RUNS = 0.01
"""Short QLoRA runs change the weights by at most this much; the drawing shades it."""

Point = tuple[float, float]
"""(rms(delta) / rms(weight), KL ratio)."""


# --- measuring -------------------------------------------------------------------------------------------------------


def scaled_adapter(folder: Path, factor: float) -> Path:
    """A copy of the demo adapter with alpha times ``factor``."""
    adapter = shutil.copytree(DEMO / "adapter", folder / f"adapter-{factor}")
    config_file = adapter / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config["lora_alpha"] *= factor
    config_file.write_text(json.dumps(config))
    return adapter


def measure(folder: Path, factor: float, rounding: str) -> Point:
    """Merge the scaled adapter into NF4 and judge the result."""
    adapter = scaled_adapter(folder, factor)
    out = str(folder / f"{rounding}-{factor}")
    settings = {}
    if rounding == "preserve":  # the others use no calibration
        settings = {"calibration": str(DEMO / "calibration.txt"), "sequence_length": 128}
    report = qmerge.merge(
        base=str(DEMO / "base-nf4"), adapter=str(adapter), target="nf4", rounding=rounding, out=out, quiet=True, **settings
    )  # fmt: skip
    fidelity = qmerge.fidelity(
        out=out, text=str(DEMO / "heldout.txt"), tokens=16384, sequence_length=128, quiet=True
    )  # fmt: skip
    shutil.rmtree(adapter)
    size = report.data.total.values["relative_size"]
    assert size is not None and fidelity.kl_ratio is not None
    return size, fidelity.kl_ratio


def measure_all(factors: list[float]) -> dict[str, list[Point]]:
    """Every rounding with every factor; also prints the table."""
    points: dict[str, list[Point]] = {rounding: [] for rounding in LEGEND}
    print(f"| delta | {' | '.join(LEGEND)} |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for factor in factors:
            cells = []
            for rounding, measured in points.items():
                size, kl_ratio = measure(Path(folder), factor, rounding)
                measured.append((size, kl_ratio))
                cells.append(f"{kl_ratio:.4f}")
            delta = points["nearest"][-1][0]
            print(f"| {delta:.1%} | {' | '.join(cells)} |", flush=True)
    return points


# --- drawing ---------------------------------------------------------------------------------------------------------


def svg(points: dict[str, list[Point]]) -> str:
    """The drawing: one line for every rounding."""
    bottom = TOP + HEIGHT
    elements = [*_frame(), *_axes()]
    for rounding, measured in points.items():
        elements += _curve(measured, COLOURS[rounding])
    elements += _legend(points)
    middle = LEFT + WIDTH / 2
    axis = "size of the delta, in % of the weights (rms)"
    elements.append(text(middle, bottom + 48, axis, size=13, colour=DARK, anchor="middle"))
    title = "Does the merged NF4 model predict like the base or like the adapter model? (KL ratio)"
    elements.append(text(LEFT, 20, title, size=14, colour=DARK))
    return "\n".join([*elements, "</svg>"]) + "\n"


def x_of(size: float) -> float:
    """Pixels from the left."""
    low = math.log10(SMALLEST)
    high = math.log10(LARGEST)
    return LEFT + (math.log10(size) - low) / (high - low) * WIDTH


def y_of(kl_ratio: float) -> float:
    """Pixels from the top; 0 is at the bottom, and nothing is drawn far above 1."""
    return TOP + (1 - min(kl_ratio, 1.05)) * HEIGHT


def _frame() -> list[str]:
    """White background, and the shaded range of short runs."""
    width = LEFT + WIDTH + RIGHT_MARGIN
    height = TOP + HEIGHT + BOTTOM_MARGIN
    shaded = x_of(SHORT_RUNS) - LEFT
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<rect x="{LEFT}" y="{TOP}" width="{shaded:.1f}" height="{HEIGHT}" fill="#eef1f7"/>',
        text(LEFT + 10, TOP + 94, "← short QLoRA runs:"),
        text(LEFT + 10, TOP + 111, "0.1 % to 1 %"),
    ]


def _axes() -> list[str]:
    elements = []
    labels = {0.0: "adapter model = 0", 0.25: "0.25", 0.5: "0.5", 0.75: "0.75", 1.0: "base model = 1"}
    for kl_ratio, label in labels.items():
        y = y_of(kl_ratio)
        elements.append(f'<line x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dde"/>')
        elements.append(text(LEFT - 8, y + 4, label, anchor="end"))
    for size in (0.003, 0.01, 0.03, 0.1):
        elements.append(text(x_of(size), TOP + HEIGHT + 20, f"{100 * size:g} %", anchor="middle"))
    return elements


def _curve(points: list[Point], colour: str) -> list[str]:
    """A line through all points, and a dot at each."""
    corners = []
    dots = []
    for size, kl_ratio in points:
        x = f"{x_of(size):.1f}"
        y = f"{y_of(kl_ratio):.1f}"
        corners.append(f"{x},{y}")
        dots.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>')
    line = f'<polyline points="{" ".join(corners)}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
    return [line, *dots]


def _legend(roundings: dict[str, list[Point]]) -> list[str]:
    elements = []
    for index, rounding in enumerate(roundings):
        y = TOP + 32 + 24 * index
        elements.append(f'<circle cx="{LEFT + WIDTH + 18}" cy="{y - 4}" r="5" fill="{COLOURS[rounding]}"/>')
        elements.append(text(LEFT + WIDTH + 30, y, LEGEND[rounding], size=13, colour=DARK))
    return elements


def text(x: float, y: float, words: str, *, size: int = 12, colour: str = GREY, anchor: str = "start") -> str:
    """A line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def main() -> None:
    """Measure, print, and draw if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--svg", type=Path, help="file to draw to (default: no drawing)")
    parser.add_argument("--factors", type=float, nargs="+", default=list(FACTORS))
    given = parser.parse_args()
    points = measure_all(given.factors)
    if given.svg:
        given.svg.write_text(svg(points))


if __name__ == "__main__":
    main()
