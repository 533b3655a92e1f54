"""Two adapters in one NF4 model, side by side: by peft in three ways, and by qmerge, rounded once.

    python benchmarks/combine_vs_peft.py [--base DIR --adapter DIR --adapter DIR --text FILE --calibration FILE]
        [--weights 1 1 --rows 48 --length 128]

What is wanted is base + w₁Δ₁ + w₂Δ₂, in float32, unmerged (peft's ``cat`` computes exactly that). Judged is the KL divergence
from it, on held-out text, by transformers alone; 1 is the base without the adapters. Without ``--adapter``, the demo's is
taken, and a second one is trained on the spot, on other text (a minute).
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import qmerge
import qmerge.demo

DEMO = Path(qmerge.demo.__file__).parent
BOTH = "both"


def second_adapter(base: Path, out: Path) -> Path:
    """Trained as the demo's own, on the base's kind of text."""
    from qmerge.demo import build

    torch.manual_seed(1)
    text = build.text_of(build.everyday, "benchmark", 400_000)
    build.make_adapter(base, build.tokens_of(AutoTokenizer.from_pretrained(base), text), out)
    return out


def load(folder: str | Path, dense: bool = True) -> Any:
    """In float32; bitsandbytes' values where it is NF4."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()
    return model.dequantize(torch.float32) if dense and getattr(model, "quantization_method", None) else model


def with_adapters(model: Any, given: argparse.Namespace) -> PeftModel:
    wrapped = PeftModel.from_pretrained(model, given.adapter[0], adapter_name="a0", autocast_adapter_dtype=False)
    for place, adapter in enumerate(given.adapter[1:], 1):
        wrapped.load_adapter(adapter, f"a{place}", autocast_adapter_dtype=False)
    return wrapped.eval()


def weighted(wrapped: PeftModel, given: argparse.Namespace, method: str) -> PeftModel:
    names = [f"a{place}" for place in range(len(given.adapter))]
    wrapped.add_weighted_adapter(names, given.weights, BOTH, combination_type=method)
    wrapped.set_adapter(BOTH)
    return wrapped


def merged_at_once(given: argparse.Namespace, out: Path, method: str) -> Any:
    """peft puts the adapters together, and merges the result into NF4."""
    merged = weighted(with_adapters(load(given.base, dense=False), given), given, method).merge_and_unload()
    return merged.dequantize(torch.float32)


def merged_in_turn(given: argparse.Namespace, out: Path) -> Any:
    """peft merges one after the other: quantized anew each time. (Weights of 1 only.)"""
    merged = with_adapters(load(given.base, dense=False), given).merge_and_unload(
        adapter_names=[f"a{place}" for place in range(len(given.adapter))]
    )
    return merged.dequantize(torch.float32)


def by_qmerge(given: argparse.Namespace, out: Path, rounding: str) -> Any:
    adapters = [f"{adapter}={weight}" for adapter, weight in zip(given.adapter, given.weights, strict=True)]
    text = {"calibration": given.calibration} if rounding == "preserve" else {}
    qmerge.merge(
        base=given.base, adapter=adapters, target="nf4", rounding=rounding, out=str(out), quiet=True, **text
    )  # fmt: skip
    return load(out)


def rows_of(given: argparse.Namespace) -> Tensor:
    ids = AutoTokenizer.from_pretrained(given.base)(Path(given.text).read_text(), verbose=False)["input_ids"]
    rows = min(given.rows, len(ids) // given.length)
    return torch.tensor(ids[: rows * given.length]).view(rows, given.length)


@torch.no_grad()
def log_probs(model: Any, rows: Tensor) -> Tensor:
    return torch.cat([model(input_ids=row[None]).logits.float().log_softmax(-1) for row in rows])


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--base", default=str(DEMO / "base-nf4"))
    asked.add_argument("--adapter", action="append")
    asked.add_argument("--weights", type=float, nargs="+", default=[1.0, 1.0])
    asked.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    asked.add_argument("--text", default=str(DEMO / "heldout.txt"))
    asked.add_argument("--rows", type=int, default=48)
    asked.add_argument("--length", type=int, default=128)
    given = asked.parse_args()
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        given.adapter = given.adapter or [str(DEMO / "adapter"), str(second_adapter(Path(given.base), out / "second"))]
        rows = rows_of(given)
        wanted = log_probs(weighted(with_adapters(load(given.base), given), given, "cat"), rows)
        ways: dict[str, Callable[[], Any]] = {
            "the base alone": lambda: load(given.base),
            "peft `linear`, float32, not rounded": lambda: weighted(
                with_adapters(load(given.base), given), given, "linear"
            ),
            "peft `cat`, merged into NF4": lambda: merged_at_once(given, out, "cat"),
            "peft, one after the other into NF4": lambda: merged_in_turn(given, out),
            "qmerge, nearest": lambda: by_qmerge(given, out / "nearest", "nearest"),
            "qmerge, preserve": lambda: by_qmerge(given, out / "preserve", "preserve"),
        }
        if given.weights != [1.0] * len(given.adapter):
            del ways["peft, one after the other into NF4"]
        divergences = {}
        for name, way in ways.items():
            found = log_probs(way(), rows)
            divergences[name] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    print(
        f"\n{len(given.adapter)} adapters, weights {given.weights}; {rows.numel()} tokens of {Path(given.text).name}\n"
    )
    print("| two adapters in one model | KL to both unmerged | of the base's |\n|---|---|---|")
    for name, divergence in divergences.items():
        print(f"| {name} | {divergence:.6f} | {divergence / divergences['the base alone']:.4f} |")


if __name__ == "__main__":
    main()
