"""GPTQ, side by side: qmerge's, and gptqmodel's own quantization of the same merged 16-bit model, on the same text.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/gptq_vs_gptqmodel.py [--base DIR --adapter DIR --calibration FILE --text FILE]
        [--bits 4 --group-size 64 --asym --act-order --length 128 --tokens 16384]

What a user would do without qmerge is to merge into 16 bits and quantize that. Both results are judged by qmerge's
fidelity against the unmerged adapter model, on held-out text (it reads GPTQ bit for bit as gptqmodel does,
tests/parity/test_gptq.py). Seconds per layer are those of the whole run, divided by the number of decoder layers: both
run the model, gather inputs and round; qmerge measures what survived as well.
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

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # gptqmodel 7.6 accepted_options for more workers than two cores give
DEMO = Path(qmerge.demo.__file__).parent


def by_gptqmodel(merged: Path, out: Path, given: argparse.Namespace) -> float:
    """Quantize a 16-bit model as its README does; returns seconds."""
    from gptqmodel import GPTQModel, QuantizeConfig

    batches = texts.token_batches(
        Path(given.calibration),
        merged,
        tokens=given.tokens,
        length=given.length,
        vocab_size=vocabulary(merged),
    )
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for batch in batches for row in batch]
    settings = QuantizeConfig(
        bits=given.bits, group_size=given.group_size, sym=not given.asym, desc_act=given.act_order,
        act_group_aware=not given.act_order,
    )  # fmt: skip
    started = time.monotonic()
    model = GPTQModel.load(str(merged), settings, device="cpu")
    model.quantize(samples, batch_size=1)
    model.save(str(out))
    return time.monotonic() - started


def vocabulary(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def by_qmerge(out: Path, given: argparse.Namespace) -> float:
    started = time.monotonic()
    qmerge.merge(
        base=given.base, adapter=given.adapter, target="gptq", out=str(out), bits=given.bits, quiet=True,
        group_size=given.group_size, sym=not given.asym, act_order=given.act_order, calibration=given.calibration,
        calibration_tokens=given.tokens, sequence_length=given.length,
    )  # fmt: skip
    return time.monotonic() - started


def judged(out: Path, given: argparse.Namespace) -> FidelityRecord:
    return qmerge.fidelity(
        out=str(out), text=given.text, against=(given.base, given.adapter), sequence_length=given.length, quiet=True
    )


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", default=str(DEMO / "base-nf4"))
    asked.add_argument("--adapter", default=str(DEMO / "adapter"))
    asked.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    asked.add_argument("--text", default=str(DEMO / "heldout.txt"))
    asked.add_argument("--bits", type=int, default=4)
    asked.add_argument("--group-size", type=int, default=64)
    asked.add_argument("--asym", action="store_true")
    asked.add_argument("--act-order", action="store_true")
    asked.add_argument("--length", type=int, default=128)
    asked.add_argument("--tokens", type=int, default=16384)
    given = asked.parse_args()
    layers = int(json.loads((Path(given.base) / "config.json").read_text())["num_hidden_layers"])
    with tempfile.TemporaryDirectory() as place:
        merged, theirs, ours = (Path(place) / name for name in ("merged", "gptqmodel", "qmerge"))
        qmerge.merge(base=given.base, adapter=given.adapter, target="fp16", out=str(merged), quiet=True)
        seconds = {"gptqmodel": by_gptqmodel(merged, theirs, given), "qmerge": by_qmerge(ours, given)}
        records = {"gptqmodel": judged(theirs, given), "qmerge": judged(ours, given)}
    kind = f"{given.bits} bits, groups of {given.group_size}, {'asymmetric' if given.asym else 'symmetric'}"
    print(f"\n{kind}{', act-order' if given.act_order else ''}; {Path(given.text).name}\n")
    print("| quantized by | gain kept | KL to the unmerged | KL ratio | same top token | seconds per layer |")
    print("|---|---|---|---|---|---|")
    for name, r in records.items():
        gain = "–" if r.gain_kept is None else f"{r.gain_kept:.3f}"
        print(
            f"| {name} | {gain} | {r.kl_merged:.6f} | {r.kl_ratio:.4f} | {r.top1_agreement:.1%} "
            f"| {seconds[name] / layers:.2f} |"
        )
    a, b = records["qmerge"], records["gptqmodel"]
    print(
        f"\nKL: qmerge / gptqmodel = {a.kl_merged / b.kl_merged:.2f}; time: {seconds['qmerge'] / seconds['gptqmodel']:.2f}"
    )


if __name__ == "__main__":
    main()
