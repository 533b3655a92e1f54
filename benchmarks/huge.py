"""Time and memory of ``qmerge plan`` against the size of the model: Llamas up to 405B, mixtures of up to 200,000 tensors.

    python benchmarks/huge.py [--only NAME ...] [--work DIR]

Makes the checkpoints as sparse files: right headers and lengths, and holes (zeros) for the values, so that 800 GB take a few
megabytes of disk. Each one is planned in a process of its own, without and with a target. Prints a table: tensors, size,
shards, adapted weights, CPU seconds, seconds, peak memory. The deltas are random numbers; their sizes grow with the layer.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SHARD_BYTES = 10 * 10**9
BYTES_PER_VALUE = 2
RANK = 4
HEADER = (
    "| model | tensors | GB | shards | adapted weights | target | CPU, s | wall, s | memory, GB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

Shape = tuple[int, int] | tuple[int]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and what its adapter changes.

    layers, width, inner, vocabulary  as in config.json
    experts  experts per layer; 0 for a Llama
    adapted  ends of the names of the adapted modules
    """

    name: str
    layers: int
    width: int
    inner: int
    vocabulary: int = 128_256
    experts: int = 0
    adapted: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

    def config(self) -> dict[str, Any]:
        """config.json."""
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": self.width,
            "intermediate_size": self.inner, "num_hidden_layers": self.layers, "num_attention_heads": self.width // 128,
            "num_key_value_heads": 8, "head_dim": 128, "vocab_size": self.vocabulary, "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }  # fmt: skip
        if self.experts:
            config |= {
                "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": self.experts,
                "num_experts_per_tok": 8, "moe_intermediate_size": self.inner, "decoder_sparse_step": 1,
            }  # fmt: skip
        return config

    def tensors(self) -> Iterator[tuple[str, Shape]]:
        """Name and shape of every weight, in the order of the files."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.width)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.width,)
            for name, rows in (("q_proj", self.width), ("k_proj", 1024), ("v_proj", 1024)):
                yield f"{prefix}.self_attn.{name}.weight", (rows, self.width)
            yield f"{prefix}.self_attn.o_proj.weight", (self.width, self.width)
            yield f"{prefix}.post_attention_layernorm.weight", (self.width,)
            if not self.experts:
                yield from self._mlp(f"{prefix}.mlp")
                continue
            yield f"{prefix}.self_attn.q_norm.weight", (128,)
            yield f"{prefix}.self_attn.k_norm.weight", (128,)
            yield f"{prefix}.mlp.gate.weight", (self.experts, self.width)
            for expert in range(self.experts):
                yield from self._mlp(f"{prefix}.mlp.experts.{expert}")
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocabulary, self.width)

    def _mlp(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        yield f"{prefix}.gate_proj.weight", (self.inner, self.width)
        yield f"{prefix}.up_proj.weight", (self.inner, self.width)
        yield f"{prefix}.down_proj.weight", (self.width, self.inner)


ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CASES = (
    Case(name="Llama 8B", layers=32, width=4096, inner=14336),
    Case(name="Llama 70B", layers=80, width=8192, inner=28672),
    Case(name="Llama 405B", layers=126, width=16384, inner=53248),
    Case(
        name="8 GB weight",
        layers=4,
        width=16384,
        inner=53248,
        vocabulary=262_144,
        adapted=("lm_head", *ATTENTION),
    ),
    Case(name="25k tensors", layers=64, width=1024, inner=512, experts=128, adapted=ATTENTION),
    Case(name="50k tensors", layers=64, width=1024, inner=512, experts=256, adapted=ATTENTION),
    Case(name="100k tensors", layers=64, width=1024, inner=512, experts=512, adapted=ATTENTION),
    Case(name="200k tensors", layers=64, width=1024, inner=512, experts=1024, adapted=ATTENTION),
    Case(name="50k, experts adapted", layers=64, width=1024, inner=512, experts=256),
)


# --- checkpoints without values --------------------------------------------------------------------------------------


def write_base(case: Case, folder: Path) -> tuple[int, int, int]:
    """Write a checkpoint of holes.

    Returns:
        Numbers of tensors, of bytes and of shards.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config()))
    shards: list[dict[str, Shape]] = [{}]
    size = total = 0
    for name, shape in case.tensors():
        nbytes = BYTES_PER_VALUE * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += nbytes
        total += nbytes
    file_of: dict[str, str] = {}
    for number, shapes in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_holes(folder / file, shapes)
        file_of.update(dict.fromkeys(shapes, file))
    index = {"metadata": {"total_size": total}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return len(file_of), total, len(shards)


def write_holes(path: Path, shapes: Mapping[str, Shape]) -> None:
    """A safetensors file of bfloat16 zeros that takes no room on the disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + BYTES_PER_VALUE * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_adapter(case: Case, folder: Path) -> int:
    """Write a LoRA; its delta grows with the position of the weight.

    Returns:
        Number of adapted weights.
    """
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in case.tensors():
        module = name.removesuffix(".weight")
        if not module.endswith(case.adapted) or len(shape) != 2:
            continue
        size = 1e-4 * (1 + len(tensors) / 1000)
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, shape[1]).bfloat16()
        tensors[f"base_model.model.{module}.lora_B.weight"] = (size * torch.randn(shape[0], RANK)).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(case.adapted)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return len(tensors) // 2


# --- measure ---------------------------------------------------------------------------------------------------------


def measure(base: Path, adapter: Path, target: str | None) -> tuple[float, float, float]:
    """CPU seconds, seconds, and peak memory in GB of one plan."""
    command = [sys.executable, "-m", "qmerge", "plan", "--base", str(base), "--adapter", str(adapter), "--json"]
    if target:
        command += ["--target", target]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime, time.monotonic() - started, usage.ru_maxrss / 1e6


def main() -> None:
    """Measure all cases, or those that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (a temporary one by default)")
    parser.add_argument("--targets", nargs="*", default=["", "bf16"], help='"" plans without a target')
    arguments = parser.parse_args()
    print(HEADER)
    for case in CASES:
        if arguments.only and case.name not in arguments.only:
            continue
        with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
            base, adapter = Path(folder, "base"), Path(folder, "adapter")
            tensors, nbytes, shards = write_base(case, base)
            adapted = write_adapter(case, adapter)
            for target in arguments.targets:
                cpu, wall, memory = measure(base, adapter, target or None)
                print(
                    f"| {case.name} | {tensors:,} | {nbytes / 1e9:.0f} | {shards} | {adapted:,} | {target or 'none'} | {cpu:.1f} "
                    f"| {wall:.1f} | {memory:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
