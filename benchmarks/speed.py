"""Time and memory of nearest merges and of the NF4 quantizer, next to peft, a copy, a plain shard merge and bitsandbytes.

    python benchmarks/speed.py [--layers 18] [--runs 3] [--small] [--rows nf4 bf16 ...] [--work DIR]

Every figure is that of a whole process, imports included: medians of some runs, which take turns, of wall time, CPU time and
peak resident memory. The model is a Llama of width 2048 with random weights in 4 shards (18 layers: 1.0 billion weights;
--small: 2 layers), the adapter a LoRA of rank 16 on all linear layers. Quote ratios of one run, on a shared machine those of
CPU time: absolute times depend on the machine.

    quantizer  NF4 codes and absmax of a 4096 x 4096 weight, against bitsandbytes
    gptq       a 4096 x 4096 weight to 4-bit GPTQ with 8192 inputs, their sums included, against gptqmodel; CPU time
    nf4        NF4 + LoRA to NF4, against peft (load, merge_and_unload, save)
    bf16       NF4 + LoRA to bf16, against a copy of the same bytes in and out, synced
    dense      bf16 + LoRA to bf16, against a script that loads a shard, adds the delta in float32 and saves the shard
    workers    NF4 + LoRA to NF4 with two workers, against one
    memory     NF4 + LoRA to NF4 with 4 times the layers, against the model itself
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HIDDEN, FEED_FORWARD, KEY_VALUE, VOCABULARY, RANK = 2048, 7168, 512, 8000, 16
SHARDS = 4
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (FEED_FORWARD, HIDDEN),
    "mlp.up_proj": (FEED_FORWARD, HIDDEN),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
ROWS = ("quantizer", "gptq", "nf4", "bf16", "dense", "workers", "memory")
HEADER = (
    "| row | against | qmerge: s | CPU s | GB | other: s | CPU s | GB | time, qmerge / other | CPU | memory |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)

PEFT = """
import sys, torch, warnings
warnings.filterwarnings("ignore")
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, device_map="cpu", dtype=torch.bfloat16)
merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
merged.save_pretrained(out, save_original_format=False)
"""
COPY = """
import os, shutil, sys
from pathlib import Path
base, merged, out = map(Path, sys.argv[1:])
out.mkdir()
for path in base.iterdir():
    path.read_bytes()
for path in merged.iterdir():
    shutil.copyfile(path, out / path.name)
    with (out / path.name).open("rb") as file:
        os.fsync(file)
"""
SHARD_MERGE = """
import json, os, shutil, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
base, adapter, out = map(Path, sys.argv[1:])
config = json.loads((adapter / "adapter_config.json").read_text())
lora = load_file(adapter / "adapter_model.safetensors")
out.mkdir()
for path in sorted(base.iterdir()):
    if path.suffix != ".safetensors":
        shutil.copyfile(path, out / path.name)
        continue
    tensors = load_file(path)
    for name, tensor in tensors.items():
        A = lora.get(f"base_model.model.{name.removesuffix('weight')}lora_A.weight")
        if A is not None:
            B = lora[f"base_model.model.{name.removesuffix('weight')}lora_B.weight"]
            delta = (B.float() @ A.float()) * (config["lora_alpha"] / config["r"])
            tensors[name] = (tensor.float() + delta).to(tensor.dtype)
    save_file(tensors, out / path.name, {"format": "pt"})
    with (out / path.name).open("rb") as file:
        os.fsync(file)
"""
QUANTIZER = """
import statistics, time, torch
from bitsandbytes import functional
from qmerge.formats import get_target
torch.set_num_threads(1)
target, values = get_target("nf4"), torch.randn(4096, 4096)
options = target.options({}, None, "F32")
def ours():
    grid = target.grid(target.scales(values, options), (4096, 4096), options)
    return target.pack(grid.nearest(values), options)
def theirs():
    return functional.quantize_4bit(values, blocksize=64, quant_type="nf4")[0]
def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
assert torch.equal(ours(), theirs().flatten())
print(*(statistics.median(seconds(work) for _ in range(5)) for work in (ours, theirs)))
"""

GPTQ = """
import os, time, torch
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
torch.set_num_threads(1)
from gptqmodel import QuantizeConfig
from gptqmodel.looper.named_module import NamedModule
from gptqmodel.quantization.gptq import GPTQ
from qmerge.calibration.capture import MatrixProduct
from qmerge.calibration.sums import InputSums
from qmerge.formats import get_target
from qmerge.rounding import get_rounding
from qmerge.rounding.base import RoundingContext, make_objective
from qmerge.types import Rows
SIZE, CPU = 4096, torch.device("cpu")
target, preserve = get_target("gptq"), get_rounding("preserve")
options = target.options({"group_size": 128}, None, "F32")
layer = torch.nn.Linear(SIZE, SIZE, bias=False).requires_grad_(False)
inputs = torch.randn(2 * SIZE, SIZE) * torch.logspace(0, -1.5, SIZE)
def theirs(layer, inputs):
    config = QuantizeConfig(bits=4, group_size=128, sym=True)
    task = GPTQ(NamedModule(layer, name="layer", full_name="layer", layer_index=0), config)
    task.quantizer.configure(perchannel=True)
    task.add_batch(inputs[None], None)
    return task.quantize()[0]
def ours(layer, inputs):
    size = len(layer.weight)
    sums = InputSums(["layer"], CPU)
    sums.add(None, [MatrixProduct(("layer",), inputs)])
    grid = target.grid(target.scales(layer.weight, options, None), (size, size), options, None)
    objective = make_objective(sums.statistics()["layer"], None, size, CPU)
    return grid.decode(preserve.choose(layer.weight, grid, RoundingContext(name="layer", rows=Rows(0, size), objective=objective)))
def error(weight_OI):
    return (inputs @ (weight_OI - layer.weight).T).square().sum()
for way in (ours, theirs):
    way(torch.nn.Linear(256, 256, bias=False).requires_grad_(False), inputs[:512, :256])  # compiles
    started = time.process_time()
    weight_OI = way(layer, inputs)
    print("measured", time.process_time() - started, float(error(weight_OI)))
"""


# --- inputs ----------------------------------------------------------------------------------------------------------


def make_model(folder: Path, layers: int, target: str) -> None:
    """A Llama with random weights in ``folder/nf4`` or ``folder/bf16``, and its adapter in ``folder/adapter``."""
    import torch
    from safetensors.torch import save_file

    base = folder / target
    base.mkdir(parents=True)
    torch.manual_seed(0)
    weight_map = {}
    for shard in range(SHARDS):
        tensors = shard_tensors(shard, layers, target)
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(tensors, base / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write_json(base / "config.json", model_config(layers, target))
    if not (folder / "adapter").exists():
        make_adapter(folder / "adapter", layers)


def shard_tensors(shard: int, layers: int, target: str) -> dict[str, object]:
    """The tensors of one shard: a fourth of the layers; embeddings in the first one, the head in the last one."""
    import torch

    def dense(*shape: int) -> torch.Tensor:
        return (torch.randn(shape) * 0.02).bfloat16()

    tensors: dict[str, object] = {}
    if shard == 0:
        tensors["model.embed_tokens.weight"] = dense(VOCABULARY, HIDDEN)
    if shard == SHARDS - 1:
        tensors["lm_head.weight"] = dense(VOCABULARY, HIDDEN)
        tensors["model.norm.weight"] = dense(HIDDEN)
    for layer in range(layers * shard // SHARDS, layers * (shard + 1) // SHARDS):
        prefix = f"model.layers.{layer}."
        tensors[prefix + "input_layernorm.weight"] = dense(HIDDEN)
        tensors[prefix + "post_attention_layernorm.weight"] = dense(HIDDEN)
        for module, shape in SHAPES.items():
            values_OI = dense(*shape)
            parts = quantized(values_OI) if target == "nf4" else {"weight": values_OI}
            for local, part in parts.items():
                tensors[f"{prefix}{module}.{local}"] = part
    return tensors


def quantized(values_OI: object) -> dict[str, object]:
    """A bf16 weight in NF4 with double quantization, as bitsandbytes stores it."""
    from bitsandbytes import functional

    codes, state = functional.quantize_4bit(values_OI, blocksize=64, quant_type="nf4", compress_statistics=True)
    return {"weight": codes, **{f"weight.{name}": part for name, part in state.as_dict(packed=True).items()}}


def model_config(layers: int, target: str) -> dict[str, object]:
    """config.json."""
    from transformers import BitsAndBytesConfig, LlamaConfig

    config: dict[str, object] = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=KEY_VALUE // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).to_dict()
    if target == "nf4":
        config["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        ).to_dict()
    return config


def make_adapter(folder: Path, layers: int) -> None:
    """A LoRA on all linear layers."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {}
    for layer in range(layers):
        for module, (rows, columns) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{module}."
            tensors[prefix + "lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[prefix + "lora_B.weight"] = torch.randn(rows, RANK) * 0.002
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    modules = sorted(module.rpartition(".")[2] for module in SHAPES)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": modules,
    }
    write_json(folder / "adapter_config.json", config)


def write_json(path: Path, content: object) -> None:
    """Write an object as JSON."""
    path.write_text(json.dumps(content, indent=1))


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of a whole process: wall and CPU time in seconds, peak resident memory in GB."""

    seconds: float
    cpu: float
    gigabytes: float


def run_process(command: list[str]) -> Cost:
    """Run a command to its end; a failure ends the benchmark with its last lines of output."""
    started = time.monotonic()
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # every process would compile its sources again
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(errors.decode()[-2000:])
    seconds = time.monotonic() - started
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9)  # Linux counts in kilobytes


def script(text: str, *arguments: Path) -> list[str]:
    """The command of a Python script."""
    return [sys.executable, "-c", text, *map(str, arguments)]


class Benchmark:
    """The rows of the table, on models in a folder."""

    def __init__(self, work: Path, layers: int, runs: int) -> None:
        self.work = work
        self.layers = layers
        self.runs = runs
        self.models = work / f"layers-{layers}"
        self.out = work / "out"

    def row(self, name: str) -> str:
        """Measure one row, and format it."""
        if name == "quantizer":
            return self.quantizer()
        if name == "gptq":
            return self.gptq()
        model = self.made(self.models, self.layers, "bf16" if name == "dense" else "nf4")
        adapter = self.models / "adapter"
        ours = self.merge(model, adapter, "nf4")
        if name == "nf4":
            return self.compared(name, "peft", ours, script(PEFT, model, adapter, self.out))
        if name == "workers":
            return self.compared(name, "one worker", [*ours, "--workers", "2"], ours)
        if name == "memory":
            large = self.made(self.work / f"layers-{4 * self.layers}", 4 * self.layers, "nf4")
            larger = self.merge(large, large.parent / "adapter", "nf4")
            return self.compared(name, "a fourth of the layers", larger, ours)
        ours = self.merge(model, adapter, "bf16")
        if name == "dense":
            return self.compared(name, "shard by shard", ours, script(SHARD_MERGE, model, adapter, self.out))
        merged = self.models / "merged"
        if not merged.exists():
            shutil.rmtree(self.out, ignore_errors=True)
            run_process(ours)
            self.out.rename(merged)
        return self.compared(name, "copying", ours, script(COPY, model, merged, self.out))

    def made(self, folder: Path, layers: int, target: str) -> Path:
        """The model of this many layers; made in another process, because a child's peak memory begins with its parent's."""
        if not (folder / target).exists():
            made = f"import speed; speed.make_model(speed.Path({str(folder)!r}), {layers}, {target!r})"
            subprocess.run([sys.executable, "-c", made], cwd=Path(__file__).parent, check=True)
        return folder / target

    def merge(self, base: Path, adapter: Path, target: str) -> list[str]:
        """The command of a nearest merge."""
        inputs = ["--base", str(base), "--adapter", str(adapter), "--out", str(self.out)]
        return [
            sys.executable,
            "-m",
            "qmerge",
            *inputs,
            "--target",
            target,
            "--rounding",
            "nearest",
            "--quiet",
            "--json",
        ]

    def compared(self, name: str, other_name: str, ours: list[str], other: list[str]) -> str:
        """Medians of both, in turn; a first run of each is not counted (it fills the disk cache)."""
        costs: list[list[Cost]] = [[], []]
        for run in range(self.runs + 1):
            for found, command in zip(costs, (ours, other), strict=True):
                shutil.rmtree(self.out, ignore_errors=True)
                cost = run_process(command)
                if run > 0:
                    found.append(cost)
        mine, others = map(median, costs)
        cells = [
            *(name, other_name),
            *(f"{mine.seconds:.1f}", f"{mine.cpu:.1f}", f"{mine.gigabytes:.2f}"),
            *(f"{others.seconds:.1f}", f"{others.cpu:.1f}", f"{others.gigabytes:.2f}"),
            f"{mine.seconds / others.seconds:.2f}",
            f"{mine.cpu / others.cpu:.2f}",
            f"{mine.gigabytes / others.gigabytes:.2f}",
        ]
        return f"| {' | '.join(cells)} |"

    def quantizer(self) -> str:
        """One thread each, in one process."""
        ran = subprocess.run(script(QUANTIZER), capture_output=True, text=True, check=True)
        ours, theirs = map(float, ran.stdout.split())
        rates = f"{4096**2 / ours / 1e6:.0f} and {4096**2 / theirs / 1e6:.0f} million weights/s"
        return f"| quantizer | bitsandbytes: {rates} | {ours:.3f} | | | {theirs:.3f} | | | {ours / theirs:.3f} | | |"

    def gptq(self) -> str:
        """One thread each, in one process."""
        ran = subprocess.run(script(GPTQ), capture_output=True, text=True, check=True)
        lines = [line.split() for line in ran.stdout.splitlines() if line.startswith("measured")]
        (ours, our_error), (theirs, their_error) = (map(float, line[1:]) for line in lines)
        against = f"gptqmodel: its squared error is {their_error / our_error:.2f} times ours"
        return f"| gptq | {against} | | {ours:.1f} | | | {theirs:.1f} | | | {ours / theirs:.2f} | |"


def median(costs: list[Cost]) -> Cost:
    """The medians of each."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        statistics.median(cost.cpu for cost in costs),
        statistics.median(cost.gigabytes for cost in costs),
    )


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--small", action="store_true", help="2 layers and one run")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--work", type=Path, help="folder for the models, which are kept there; none: a temporary one")
    given = parser.parse_args()
    layers, runs = (2, 1) if given.small else (given.layers, given.runs)
    weights = layers * sum(rows * columns for rows, columns in SHAPES.values())
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(given.work or Path(folder), layers, runs)
        print(f"{weights / 1e6:.0f} million weights in linear layers, {os.cpu_count()} cores, {platform.machine()}")
        print(HEADER)
        for name in given.rows:
            print(benchmark.row(name), flush=True)


if __name__ == "__main__":
    main()
