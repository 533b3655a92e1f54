"""GPTQ by qmerge, and by gptqmodel from the same merged 16-bit model, with the same calibration text.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/gptq_vs_gptqmodel.py [--base DIR] [--adapter DIR] [--calibration FILE]
        [--text FILE] [--bits 4] [--group-size 64] [--asym] [--act-order] [--length 128] [--tokens 16384]

Compares a merge by qmerge into GPTQ with the way without it: merge into 16 bits, then quantize with gptqmodel.
``qmerge.fidelity`` judges both against the unmerged adapter model, on held-out text; it reads GPTQ bit for bit as gptqmodel
does (tests/parity/test_gptq.py). Seconds per layer are the time of the whole run, divided by the number of decoder layers:
both run the model, collect inputs and round; qmerge also measures survival. Needs gptqmodel, and some minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import qmerge
import qmerge.demo
from qmerge.calibration import texts
from qmerge.schema import FidelityRecord

# gptqmodel 7.6 asks for more worker threads than a machine with two cores has.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

DEMO = Path(qmerge.demo.__file__).parent
COLUMNS = ("quantized by", "gain kept", "KL to the unmerged", "KL ratio", "same top token", "seconds per layer")


def quantize_with_gptqmodel(merged: Path, out: Path, given: argparse.Namespace) -> float:
    """Quantize a 16-bit model as gptqmodel's README does. Returns seconds."""
    from gptqmodel import GPTQModel, QuantizeConfig

    settings = QuantizeConfig(
        bits=given.bits,
        group_size=given.group_size,
        sym=not given.asym,
        desc_act=given.act_order,
        act_group_aware=not given.act_order,
    )
    samples = calibration_samples(merged, given)
    started = time.monotonic()
    model = GPTQModel.load(str(merged), settings, device="cpu")
    model.quantize(samples, batch_size=1)
    model.save(str(out))
    return time.monotonic() - started


def calibration_samples(merged: Path, given: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The sequences that qmerge calibrates with, in gptqmodel's form."""
    batches = texts.token_batches(
        Path(given.calibration),
        merged,
        tokens=given.tokens,
        length=given.length,
        vocab_size=config_of(merged)["vocab_size"],
    )
    samples = []
    for batch in batches:
        for row in batch:
            samples.append({"input_ids": row.tolist(), "attention_mask": [1] * len(row)})
    return samples


def merge_with_qmerge(out: Path, given: argparse.Namespace) -> float:
    """Merge into GPTQ. Returns seconds."""
    started = time.monotonic()
    qmerge.merge(
        base=given.base,
        adapter=given.adapter,
        target="gptq",
        out=str(out),
        bits=given.bits,
        group_size=given.group_size,
        sym=not given.asym,
        act_order=given.act_order,
        calibration=given.calibration,
        calibration_tokens=given.tokens,
        sequence_length=given.length,
        quiet=True,
    )
    return time.monotonic() - started


def judge(out: Path, given: argparse.Namespace) -> FidelityRecord:
    """Compare a model with the base and the unmerged adapter model, on held-out text."""
    return qmerge.fidelity(
        out=str(out), text=given.text, against=(given.base, given.adapter), sequence_length=given.length, quiet=True
    )


def config_of(folder: Path) -> dict[str, int]:
    """config.json."""
    return dict(json.loads((folder / "config.json").read_text()))


def settings_line(given: argparse.Namespace) -> str:
    """``4 bits, groups of 64, symmetric; heldout.txt``."""
    parts = [f"{given.bits} bits", f"groups of {given.group_size}", "asymmetric" if given.asym else "symmetric"]
    if given.act_order:
        parts.append("act-order")
    return f"{', '.join(parts)}; {Path(given.text).name}"


def table_row(name: str, record: FidelityRecord, seconds_per_layer: float) -> str:
    """One line of the table."""
    gain_kept = "–"  # the adapter gains nothing on this text
    if record.gain_kept is not None:
        gain_kept = f"{record.gain_kept:.3f}"
    cells = [
        name,
        gain_kept,
        f"{record.kl_merged:.6f}",
        f"{record.kl_ratio:.4f}",
        f"{record.top1_agreement:.1%}",
        f"{seconds_per_layer:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(DEMO / "base-nf4"))
    parser.add_argument("--adapter", default=str(DEMO / "adapter"))
    parser.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    parser.add_argument("--text", default=str(DEMO / "heldout.txt"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens to calibrate with (default: 16384)")
    return parser.parse_args()


def main() -> None:
    """Quantize with both, judge both, print the table."""
    given = parse_arguments()
    layers = config_of(Path(given.base))["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        merged = folder / "merged"
        qmerge.merge(base=given.base, adapter=given.adapter, target="fp16", out=str(merged), quiet=True)
        theirs_seconds = quantize_with_gptqmodel(merged, folder / "gptqmodel", given)
        ours_seconds = merge_with_qmerge(folder / "qmerge", given)
        theirs = judge(folder / "gptqmodel", given)
        ours = judge(folder / "qmerge", given)
    print(f"\n{settings_line(given)}\n")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    print(table_row("gptqmodel", theirs, theirs_seconds / layers))
    print(table_row("qmerge", ours, ours_seconds / layers))
    kl = ours.kl_merged / theirs.kl_merged
    print(f"\nKL: qmerge / gptqmodel = {kl:.2f}; time: {ours_seconds / theirs_seconds:.2f}")


if __name__ == "__main__":
    main()
