"""What survives against how large the delta is: the demo adapter, made smaller and larger, merged into NF4.

    python benchmarks/survival_by_size.py [--svg docs/survival.svg]

Prints a table (KL ratio on held-out text: 0 predicts as the adapter model, 1 as the base) and draws it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import qmerge
import qmerge.demo

DEMO = Path(qmerge.demo.__file__).parent
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
COLOURS = {"nearest": "#c0392b", "stochastic": "#d08700", "preserve": "#2563a8"}
TEXT = {"calibration": str(DEMO / "calibration.txt"), "sequence_length": 128}
WIDTH, HEIGHT = 560, 260


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
    import math

    low, high = math.log10(0.003), math.log10(0.15)

    def place(size: float, ratio: float) -> tuple[float, float]:
        return 70 + (math.log10(size) - low) / (high - low) * WIDTH, 30 + (1 - min(ratio, 1.05)) * HEIGHT

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH + 190} {HEIGHT + 95}" font-family="system-ui, sans-serif">',
        f'<rect width="{WIDTH + 190}" height="{HEIGHT + 95}" fill="white"/>',
    ]
    for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = place(0.01, ratio)[1]
        parts.append(f'<line x1="70" x2="{70 + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dde"/>')
        label = {0.0: "0  adapter", 1.0: "1  base"}.get(ratio, f"{ratio:g}")
        parts.append(f'<text x="64" y="{y + 4:.1f}" font-size="12" text-anchor="end" fill="#556">{label}</text>')
    for size in (0.003, 0.01, 0.03, 0.1):
        x = place(size, 0)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT + 52}" font-size="12" text-anchor="middle" fill="#556">{size:.1%}</text>'
        )
    for name, points in found.items():
        placed = [place(*point) for point in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS[name]}"/>' for x, y in placed]
    for i, name in enumerate(found):
        y = 60 + 24 * i
        parts.append(f'<circle cx="{WIDTH + 92}" cy="{y - 4}" r="5" fill="{COLOURS[name]}"/>')
        parts.append(f'<text x="{WIDTH + 104}" y="{y}" font-size="13" fill="#223">{name}</text>')
    parts.append(
        f'<text x="{70 + WIDTH / 2}" y="{HEIGHT + 80}" font-size="13" text-anchor="middle" fill="#223">'
        "size of the delta: rms(delta) / rms(weight)</text>"
    )
    parts.append('<text x="70" y="18" font-size="13" fill="#223">KL ratio of the merged NF4 model</text></svg>')
    return "\n".join(parts) + "\n"


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
