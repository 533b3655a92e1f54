"""Two adapters in one NF4 model: three ways with peft, and qmerge, which rounds once.

    python benchmarks/combine_vs_peft.py [--base DIR] [--adapter DIR --adapter DIR] [--weights 1 1] [--text FILE]
        [--calibration FILE] [--rows 48] [--length 128]

Measures the KL divergence of every model from the wanted one on held-out text, with transformers alone; the last column
divides it by that of the base without adapters. The wanted model is base + w₁Δ₁ + w₂Δ₂ in float32, unmerged: peft's ``cat``
computes exactly this. Without ``--adapter``, the adapters are that of the demo and a second one, trained now on other text.
Takes some minutes.
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
COMBINED = "combined"
"""peft's name for the adapter that is made of the others."""

BASE_ALONE = "the base alone"


# --- models ----------------------------------------------------------------------------------------------------------


def train_second_adapter(base: Path, out: Path) -> Path:
    """An adapter trained as that of the demo, on the kind of text that the base learned."""
    from qmerge.demo import build, texts

    torch.manual_seed(1)
    text = texts.text_of(texts.everyday, "benchmark", 400_000)
    rows = build.tokens_of(AutoTokenizer.from_pretrained(base), text)
    build.make_adapter(base, rows, out)
    return out


def load(folder: str | Path) -> Any:
    """A model in float32; an NF4 model with the values of bitsandbytes."""
    model = load_stored(folder)
    if getattr(model, "quantization_method", None):
        return model.dequantize(torch.float32)
    return model


def load_stored(folder: str | Path) -> Any:
    """A model as it is stored; dense weights in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu").eval()


def adapter_names(given: argparse.Namespace) -> list[str]:
    """peft's names for the adapters."""
    return [f"adapter-{index}" for index in range(len(given.adapter))]


def with_adapters(model: Any, given: argparse.Namespace) -> PeftModel:
    """The model with all adapters loaded, unmerged; float32 stays float32."""
    names = adapter_names(given)
    adapted = PeftModel.from_pretrained(
        model, given.adapter[0], adapter_name=names[0], autocast_adapter_dtype=False
    )  # fmt: skip
    for name, adapter in zip(names[1:], given.adapter[1:], strict=True):
        adapted.load_adapter(adapter, name, autocast_adapter_dtype=False)
    return adapted.eval()


def combined(model: Any, given: argparse.Namespace, method: str) -> PeftModel:
    """The model with one adapter that peft combines from all of them by ``method``, unmerged."""
    adapted = with_adapters(model, given)
    adapted.add_weighted_adapter(adapter_names(given), given.weights, COMBINED, combination_type=method)
    adapted.set_adapter(COMBINED)
    return adapted


def merged_once_by_peft(given: argparse.Namespace) -> Any:
    """peft combines the adapters by ``cat`` and merges the result into NF4."""
    adapted = combined(load_stored(given.base), given, "cat")
    return adapted.merge_and_unload().dequantize(torch.float32)


def merged_in_turn_by_peft(given: argparse.Namespace) -> Any:
    """peft merges one adapter after the other into NF4, and quantizes again each time. Its weights are 1."""
    adapted = with_adapters(load_stored(given.base), given)
    merged = adapted.merge_and_unload(adapter_names=adapter_names(given))
    return merged.dequantize(torch.float32)


def merged_by_qmerge(given: argparse.Namespace, out: Path, rounding: str) -> Any:
    """qmerge merges all adapters and rounds once."""
    adapters = []
    for adapter, weight in zip(given.adapter, given.weights, strict=True):
        adapters.append(f"{adapter}={weight}")
    settings = {}
    if rounding == "preserve":  # the others use no calibration
        settings = {"calibration": given.calibration}
    qmerge.merge(
        base=given.base, adapter=adapters, target="nf4", rounding=rounding, out=str(out), quiet=True, **settings
    )  # fmt: skip
    return load(out)


def models_to_compare(given: argparse.Namespace, folder: Path) -> dict[str, Callable[[], Any]]:
    """Name → how to make the model. One is in memory at a time."""
    models: dict[str, Callable[[], Any]] = {
        BASE_ALONE: lambda: load(given.base),
        "peft `linear`, float32, not rounded": lambda: combined(load(given.base), given, "linear"),
        "peft `cat`, merged into NF4": lambda: merged_once_by_peft(given),
    }
    if all(weight == 1 for weight in given.weights):
        models["peft, one after the other into NF4"] = lambda: merged_in_turn_by_peft(given)
    models["qmerge, nearest"] = lambda: merged_by_qmerge(given, folder / "nearest", "nearest")
    models["qmerge, preserve"] = lambda: merged_by_qmerge(given, folder / "preserve", "preserve")
    return models


# --- measuring -------------------------------------------------------------------------------------------------------


def read_rows(given: argparse.Namespace) -> Tensor:
    """int64 [rows, length]: the beginning of the text."""
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    ids = tokenizer(Path(given.text).read_text(), verbose=False)["input_ids"]
    rows = min(given.rows, len(ids) // given.length)
    return torch.tensor(ids[: rows * given.length]).view(rows, given.length)


@torch.no_grad()
def log_probs(model: Any, rows: Tensor) -> Tensor:
    """float32 [rows, length, V]: log probabilities of every next token."""
    return torch.cat([model(input_ids=row[None]).logits.float().log_softmax(-1) for row in rows])


def divergence(wanted: Tensor, other: Tensor) -> float:
    """KL(wanted ‖ other), the mean over all tokens, in nats."""
    return float((wanted.exp() * (wanted - other)).sum(-1).mean())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(DEMO / "base-nf4"))
    parser.add_argument("--adapter", action="append", help="give it twice (default: that of the demo, and a new one)")
    parser.add_argument("--weights", type=float, nargs="+", default=[1.0, 1.0])
    parser.add_argument("--calibration", default=str(DEMO / "calibration.txt"))
    parser.add_argument("--text", default=str(DEMO / "heldout.txt"))
    parser.add_argument("--rows", type=int, default=48, help="sequences to judge with (default: 48)")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence (default: 128)")
    return parser.parse_args()


def main() -> None:
    """Make every model, measure its divergence, print the table."""
    given = parse_arguments()
    warnings.filterwarnings("ignore")  # peft warns about every merge into 4 bits
    divergences = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not given.adapter:
            second = train_second_adapter(Path(given.base), folder / "second")
            given.adapter = [str(DEMO / "adapter"), str(second)]
        rows = read_rows(given)
        wanted = log_probs(combined(load(given.base), given, "cat"), rows)
        for model_name, make_model in models_to_compare(given, folder).items():
            divergences[model_name] = divergence(wanted, log_probs(make_model(), rows))
    text_name = Path(given.text).name
    print(f"\n{len(given.adapter)} adapters, weights {given.weights}; {rows.numel()} tokens of {text_name}\n")
    print("| two adapters in one model | KL to both unmerged | of the base's |\n|---|---|---|")
    for model_name, kl in divergences.items():
        print(f"| {model_name} | {kl:.6f} | {kl / divergences[BASE_ALONE]:.4f} |")


if __name__ == "__main__":
    main()
