"""The same merge by peft and by qmerge, each as a whole process: wall time and peak memory, side by side.

    python benchmarks/peft_vs_qmerge.py [--hidden 2048] [--layers 4] [--runs 3] [--targets nf4 bf16]

Makes a synthetic NF4 Llama and a LoRA adapter of rank 16 on all linear layers, then runs in turn: peft (load,
merge_and_unload, save) and qmerge. Both start a fresh interpreter, so imports count. The median is what to quote, as a
ratio: absolute times are the machine's. peft writes NF4 through ``save_original_format=False``, because transformers
5.23 cannot save a merged pre-quantized model otherwise (NotImplementedError).
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
from pathlib import Path

PEFT = """
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


def make_inputs(folder: Path, hidden: int, layers: int) -> tuple[Path, Path]:
    """A random NF4 Llama and a random adapter, by the stock libraries."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 256), vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "dense")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=linear))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape) * 0.01
    wrapped.save_pretrained(folder / "adapter")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    quantized = AutoModelForCausalLM.from_pretrained(
        folder / "dense", quantization_config=quantization, dtype=torch.bfloat16, device_map="cpu"
    )
    quantized.save_pretrained(folder / "base")
    shutil.rmtree(folder / "dense")
    return folder / "base", folder / "adapter"


def timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak resident GB) of a whole process; it must succeed."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    return time.monotonic() - started, usage.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--targets", nargs="+", default=["nf4", "bf16"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # In a process of its own: a child's peak memory is counted from what its parent held when it was forked.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            base, adapter = pool.apply(make_inputs, (folder, args.hidden, args.layers))
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print(f"hidden {args.hidden}, {args.layers} layers: base {size / 1e6:.0f} MB in NF4 with double quantization")
        print("| target | peft: s | GB | qmerge: s | GB | time, qmerge / peft | memory, qmerge / peft |")
        print("|---|---|---|---|---|---|---|")
        for target in args.targets:
            print(row(target, base, adapter, folder / "out", args.runs), flush=True)


def row(target: str, base: Path, adapter: Path, out: Path, runs: int) -> str:
    """Medians of ``runs`` alternating runs, after one of each that is not counted."""
    peft = [sys.executable, "-c", PEFT, str(base), str(adapter), target, str(out)]
    ours = [
        sys.executable, "-m", "qmerge", "--base", str(base), "--adapter", str(adapter), "--target", target,
        "--out", str(out), "--quiet", "--json",
    ]  # fmt: skip
    figures: dict[str, list[tuple[float, float]]] = {"peft": [], "qmerge": []}
    for run in range(runs + 1):
        for who, command in (("peft", peft), ("qmerge", ours)):
            shutil.rmtree(out, ignore_errors=True)
            figure = timed(command)
            if run:
                figures[who].append(figure)
    (ps, pm), (qs, qm) = (
        (statistics.median(s for s, _ in f), statistics.median(m for _, m in f)) for f in figures.values()
    )
    return f"| {target} | {ps:.1f} | {pm:.2f} | {qs:.1f} | {qm:.2f} | {qs / ps:.2f} | {qm / pm:.2f} |"


if __name__ == "__main__":
    main()
