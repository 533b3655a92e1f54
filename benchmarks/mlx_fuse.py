"""``mlx_lm.fuse`` and qmerge on a 4-bit MLX model, judged by transformers and peft.

    python benchmarks/mlx_fuse.py --work DIR --model ID|DIR --adapter DIR --calibration FILE --text FILE

The model (16 bits) is quantized by ``mlx_lm.convert -q``. The adapter, which PEFT saved, is written in MLX's form for both
tools. ``mlx_lm.fuse`` adds it and quantizes again with fresh scales; qmerge keeps the model's own scales and biases.
``mx.dequantize`` gives the values of every model in float32. The reference is the MLX model with peft's adapter on it,
unmerged.

    gain kept   (loss(base) − loss(merged)) / (loss(base) − loss(reference))
    KL ratio    KL(reference ‖ merged) / KL(reference ‖ base)

Needs mlx and mlx_lm: on Linux, ``pip install "mlx[cpu]" mlx-lm``. What is in ``--work`` already is not made again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODELS = {"fused": "mlx_lm.fuse", "merged": "qmerge, text of the task"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--work", "--model", "--adapter", "--calibration", "--text"):
        parser.add_argument(name, required=True)
    parser.add_argument("--tokens", type=int, default=10240, help="tokens of the text")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    args = parser.parse_args()
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    base, adapter = work / "base", work / "adapter"
    if not base.exists():
        run("mlx_lm", "convert", "--hf-path", args.model, "--mlx-path", str(base), "-q")
    if not adapter.exists():
        write_mlx_adapter(Path(args.adapter), adapter)
    if not (work / "fused").exists():
        run("mlx_lm", "fuse", "--model", str(base), "--adapter-path", str(adapter), "--save-path", str(work / "fused"))
    if not (work / "merged").exists():
        merged = ["--target", "mlx", "--calibration", args.calibration, "--out", str(work / "merged")]
        run("qmerge", "--base", str(base), "--adapter", str(adapter), *merged)
    for name in ("base", *MODELS):
        write_dense(work / name, work / f"{name}-dense", tokenizer=base)
    judge(work, Path(args.adapter), sequences(base, args.text, args.tokens, args.length))


def run(module: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def write_mlx_adapter(source: Path, folder: Path) -> None:
    """A LoRA of linear layers in MLX's form."""
    config = json.loads((source / "adapter_config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "adapter_model.safetensors").items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        tensors[f"{module}.{part.lower()}"] = tensor.float().T.contiguous()
    folder.mkdir()
    save_file(tensors, folder / "adapters.safetensors")
    keys = sorted(
        {name.split(".", 3)[3].rpartition(".")[0] for name in tensors}
    )  # model.layers.0.self_attn.q_proj.lora_a
    parameters = {"rank": config["r"], "scale": config["lora_alpha"] / config["r"], "dropout": 0.0, "keys": keys}
    layers = 1 + max(int(name.split(".")[2]) for name in tensors)
    mlx_config = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(mlx_config))


def write_dense(source: Path, folder: Path, tokenizer: Path) -> None:
    """The values of an MLX model in float32, by ``mx.dequantize``, for transformers."""
    import mlx.core as mx
    import numpy as np

    if folder.exists():
        return
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    quantization = config.pop("quantization")
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    for path in tokenizer.glob("tokenizer*"):
        shutil.copy(path, folder)
    arrays: dict[str, Any] = {}
    for path in source.glob("*.safetensors"):
        arrays.update(mx.load(str(path)))
    values: dict[str, Tensor] = {}
    for name, array in arrays.items():
        module, _, local = name.rpartition(".")
        if local in ("scales", "biases"):
            continue
        if f"{module}.scales" in arrays:
            scales, biases = (arrays[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            array = mx.dequantize(array, scales, biases, quantization["group_size"], quantization["bits"])
        values[name] = torch.from_numpy(np.array(array.astype(mx.float32)))
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


def sequences(model: Path, text: str, tokens: int, length: int) -> Tensor:
    """Token ids [N, L] of the beginning of a text."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(Path(text).read_text(encoding="utf-8"))["input_ids"]
    count = min(tokens, len(ids)) // length
    return torch.tensor(ids[: count * length]).view(count, length)


@torch.no_grad()
def judge(work: Path, adapter: Path, ids_NL: Tensor) -> None:
    """Print one row for every model. The models are in memory together, so that the reference runs once."""
    from peft import PeftModel

    models = {name: load(work / f"{name}-dense") for name in ("base", *MODELS)}
    reference = PeftModel.from_pretrained(load(work / "base-dense"), adapter).eval()
    loss = dict.fromkeys(("reference", *models), 0.0)
    kl = dict.fromkeys(models, 0.0)
    for ids_L in ids_NL:
        expected = torch.log_softmax(reference(input_ids=ids_L[None]).logits[0], dim=-1)
        loss["reference"] += loss_of(expected, ids_L)
        for name, model in models.items():
            found = torch.log_softmax(model(input_ids=ids_L[None]).logits[0], dim=-1)
            loss[name] += loss_of(found, ids_L)
            kl[name] += float((expected.exp() * (expected - found)).sum())
    print("| merge | gain kept | KL ratio |\n|---|---|---|")
    for name, title in MODELS.items():
        gain = (loss["base"] - loss[name]) / (loss["base"] - loss["reference"])
        print(f"| {title} | {gain:.3f} | {kl[name] / kl['base']:.4f} |")


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def loss_of(log_probabilities_LV: Tensor, ids_L: Tensor) -> float:
    return -float(log_probabilities_LV[:-1].gather(-1, ids_L[1:, None]).sum())


if __name__ == "__main__":
    main()
