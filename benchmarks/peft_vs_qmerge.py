"""Wall time and peak memory of the same merge by peft and by qmerge.

    python benchmarks/peft_vs_qmerge.py [--hidden 2048] [--layers 4] [--runs 3] [--targets nf4 bf16]

Compares peft (load, ``merge_and_unload``, save) with ``qmerge merge``, each in a new process, so that imports count. The
model is a Llama in NF4 with random weights, the adapter a LoRA of rank 16 on all linear layers. Quote the ratios of the
medians: absolute times depend on the machine. peft saves NF4 with ``save_original_format=False``, because transformers 5.23
cannot save a merged quantized model otherwise (NotImplementedError).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

PEFT_SCRIPT = """
import sys, torch, warnings
warnings.filterwarnings("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, target, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.float32)
if target != "nf4":
    model = model.dequantize(torch.float32)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
if target != "nf4":
    merged = merged.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[target])
merged.save_pretrained(out, save_original_format=False)
"""
HEADER = "| target | peft: s | GB | qmerge: s | GB | time, qmerge / peft | memory, qmerge / peft |\n|---|---|---|---|---|---|---|"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# --- inputs ----------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path, hidden: int, layers: int) -> None:
    """A random NF4 Llama in ``folder/base`` and a random adapter in ``folder/adapter``, by transformers and peft."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256),
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    save_adapter(model, folder / "adapter")
    save_quantized(folder / "dense", folder / "base")
    shutil.rmtree(folder / "dense")


def save_adapter(model: object, out: Path) -> None:
    """A LoRA of rank 16 on all linear layers; peft starts with B = 0, so B gets random values."""
    import torch
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=PROJECTIONS))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.01
    adapted.save_pretrained(out)


def save_quantized(dense: Path, out: Path) -> None:
    """The model in NF4 with double quantization."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    model.save_pretrained(out)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of a whole process: wall time in seconds, peak resident memory in GB."""

    seconds: float
    gigabytes: float


def run_process(command: list[str]) -> Cost:
    """Run a command to its end; a failure ends the benchmark with its last lines of output."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    return Cost(time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9)  # Linux counts in kilobytes


def median(costs: list[Cost]) -> Cost:
    """The medians of time and of memory."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.gigabytes for cost in costs),
    )


def table_row(target: str, folder: Path, runs: int) -> str:
    """Medians of ``runs`` runs of both, in turn; a first run of each is not counted (it fills the disk cache)."""
    base = str(folder / "base")
    adapter = str(folder / "adapter")
    out = str(folder / "out")
    qmerge_arguments = ["--base", base, "--adapter", adapter, "--target", target, "--out", out, "--quiet", "--json"]
    commands = {
        "peft": [sys.executable, "-c", PEFT_SCRIPT, base, adapter, target, out],
        "qmerge": [sys.executable, "-m", "qmerge", *qmerge_arguments],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            cost = run_process(command)
            if run > 0:
                costs[name].append(cost)
    peft = median(costs["peft"])
    ours = median(costs["qmerge"])
    cells = [
        target,
        f"{peft.seconds:.1f}",
        f"{peft.gigabytes:.2f}",
        f"{ours.seconds:.1f}",
        f"{ours.gigabytes:.2f}",
        f"{ours.seconds / peft.seconds:.2f}",
        f"{ours.gigabytes / peft.gigabytes:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Make the inputs, then print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size, a multiple of 256 (default: 2048)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["nf4", "bf16"])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In another process: the peak memory of a child includes that of its parent when it was forked.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(make_inputs, (folder, given.hidden, given.layers))
        size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        print(f"hidden {given.hidden}, {given.layers} layers: base {size / 1e6:.0f} MB in NF4 with double quantization")
        print(HEADER)
        for target in given.targets:
            print(table_row(target, folder, given.runs), flush=True)


if __name__ == "__main__":
    main()
