"""An adapter in a GGUF file: the usual way over llama.cpp's quantizer, and qmerge's two ways, judged by transformers and peft.

    python benchmarks/gguf_files.py --base NF4 --original 16BIT --adapter DIR --calibration FILE --text FILE --work DIR
                              [--types q4_k_m q4_0 iq4_nl q6_k] [--bases nf4 gguf] [--tokens 5120]

From an NF4 base with an adapter (reference: the base with the adapter attached):

    quantizer    the adapter merged into the 16-bit original, then llama.cpp's quantizer
    importance   the same with an importance matrix from the calibration text
    dequantized  the same, but the adapter merged into the dequantized NF4 base
    qmerge       qmerge --base NF4 --target TYPE --calibration FILE

From a GGUF file of the original, made by llama.cpp's quantizer with the importance matrix (reference: that file's values with
the adapter attached):

    again        the adapter added to the file's values, then llama.cpp's quantizer with the importance matrix again
    nearest      qmerge --base FILE --rounding nearest: the file's scales are kept
    kept         qmerge --base FILE --calibration FILE: the same with preserve

llama.cpp's quantizer is that of libgguf, which gives the same bytes. All files are read back by transformers' GGUF loader, which
dequantizes with llama.cpp's ``gguf`` package, and compared in float32:

    gain kept   (loss(base) − loss(merged)) / (loss(base) − loss(reference))
    KL ratio    KL(reference ‖ merged) / KL(reference ‖ base)

Results are kept in ``--work``: a second call does what is missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from qmerge.calibration.texts import read_texts, tokenize
from qmerge.formats.gguf import in_file_order
from qmerge.gguf.base import GgufCheckpoint, read_gguf

Rows = dict[str, dict[str, float]]


def load(path: Path) -> Any:
    """A model in float32: a folder (4-bit layers are dequantized), or a GGUF file."""
    if path.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, device_map="cpu")
    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    return model.float().eval()


def unmerged(path: Path, adapter: Path) -> Any:
    """A model with the adapter attached."""
    return PeftModel.from_pretrained(load(path), adapter).eval()


def token_batches(folder: Path, path: Path, tokens: int, length: int) -> Tensor:
    """int64 [N, length]: text by the tokenizer in a folder."""
    ids = tokenize(read_texts(path), folder)[: tokens // length * length]
    return torch.tensor(ids).view(-1, length)


@torch.no_grad()
def compare(model: Any, reference: Any, batches: Tensor) -> tuple[float, float]:
    """Loss of the model, and KL(reference ‖ model), in nats per token."""
    loss = divergence = 0.0
    for ids in batches:
        expected = reference(input_ids=ids[None]).logits[0].log_softmax(-1)
        found = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        loss -= float(found[:-1].gather(-1, ids[1:, None]).mean()) / len(batches)
        divergence += float((expected.exp() * (expected - found)).sum(-1).mean()) / len(batches)
    return loss, divergence


@torch.no_grad()
def importance(model: Any, batches: Tensor) -> dict[str, Tensor]:
    """Mean square of every input of every linear layer, which is what an importance matrix holds."""
    sums: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def add(_: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
                squares = inputs[0].flatten(0, -2).square().mean(0) / len(batches)
                sums[f"{name}.weight"] = sums.get(f"{name}.weight", 0) + squares

            hooks.append(module.register_forward_pre_hook(add))
    for ids in batches:
        model(input_ids=ids[None])
    for hook in hooks:
        hook.remove()
    return sums


def quantize(values: dict[str, Tensor], like: Path, out: Path, weights: dict[str, Tensor]) -> None:
    """llama.cpp's quantizer: the file ``like``, with these values on fresh scales.

    Args:
        values: name of a weight → its float32 values.
        weights: name → importance of its inputs.
    """
    import libgguf

    out.parent.mkdir(parents=True, exist_ok=True)
    checkpoint: GgufCheckpoint = read_gguf(like, None)
    data = bytearray(like.read_bytes())
    for name, weight in checkpoint.weights.items():
        if name not in values:
            continue
        place = checkpoint.mapped.places[name]
        stored_type = checkpoint.header.types[place.tensor]
        (info,) = weight.parts.values()
        rows = in_file_order(values[name].float().reshape(info.shape[0], -1), place.order).numpy()
        if stored_type == "F32":
            stored = rows.tobytes()
        else:
            matrix = weights[name].numpy() if name in weights else None
            stored = libgguf.quantize_rows(rows, libgguf.GGMLQuantizationType[stored_type], matrix).tobytes()
        data[info.offset : info.offset + len(stored)] = stored
    out.write_bytes(data)


def qmerge(*args: str | Path) -> None:
    """Run the command line."""
    subprocess.run([sys.executable, "-m", "qmerge", *map(str, args), "--quiet"], check=True)


class Work:
    """The files of the benchmark, each made when it is first asked for."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.folder: Path = args.work
        self._weights: dict[str, Tensor] = {}

    def file(self, name: str, make: Callable[[Path], None]) -> Path:
        """``NAME/model.gguf``."""
        path: Path = self.folder / name / "model.gguf"
        if not path.exists():
            make(path)
        return path

    def merged_values(self, base: Path) -> dict[str, Tensor]:
        """A model with the adapter, merged in float32."""
        return dict(PeftModel.from_pretrained(load(base), self.args.adapter).merge_and_unload().state_dict())

    def weights(self) -> dict[str, Tensor]:
        """The importance matrix, of the original with the adapter."""
        if not self._weights:
            batches = token_batches(self.args.base, self.args.calibration, 16384, 512)
            self._weights = importance(unmerged(self.args.original, self.args.adapter).merge_and_unload(), batches)
        return self._weights

    def template(self, kind: str) -> Path:
        """A file of this type: its header is used, not its values."""

        def make(path: Path) -> None:
            qmerge("--base", self.args.original, "--adapter", self.args.adapter, "--target", kind, "--rounding", "nearest",
                   "--out", path.parent)  # fmt: skip

        return self.file(f"{kind}-template", make)

    def from_folder(self, kind: str, row: str) -> Path:
        """A row that starts from the NF4 base."""
        if row == "qmerge":

            def merge(path: Path) -> None:
                qmerge("--base", self.args.base, "--adapter", self.args.adapter, "--target", kind,
                       "--calibration", self.args.calibration, "--out", path.parent)  # fmt: skip

            return self.file(f"{kind}-qmerge", merge)

        def make(path: Path) -> None:
            base = self.args.base if row == "dequantized" else self.args.original
            weights = {} if row == "quantizer" else self.weights()
            quantize(self.merged_values(base), self.template(kind), path, weights)

        return self.file(f"{kind}-{row}", make)

    def gguf_base(self, kind: str) -> Path:
        """The original without the adapter, as a GGUF file."""

        def make(path: Path) -> None:
            quantize(dict(load(self.args.original).state_dict()), self.template(kind), path, self.weights())

        return self.file(f"{kind}-base", make)

    def from_gguf(self, kind: str, row: str) -> Path:
        """A row that starts from the GGUF base."""
        base = self.gguf_base(kind)

        def make(path: Path) -> None:
            if row == "again":
                values = dict(unmerged(base, self.args.adapter).merge_and_unload().state_dict())
                quantize(values, base, path, self.weights())
                return
            how = ["--rounding", "nearest"] if row == "nearest" else ["--calibration", str(self.args.calibration)]
            qmerge("--base", base, "--adapter", self.args.adapter, "--target", "gguf", *how, "--out", path.parent)

        return self.file(f"{kind}-{row}", make)


def judge(work: Work, base: Path, files: dict[str, Path], results: Path) -> Rows:
    """Gain kept and KL ratio of every file."""
    rows: Rows = {}
    if results.exists():
        rows = json.loads(results.read_text())
    missing = [name for name in files if name not in rows]
    if not missing:
        return rows
    batches = token_batches(work.args.base, work.args.text, work.args.tokens, 512)
    reference = unmerged(base, work.args.adapter)
    base_loss, base_divergence = compare(load(base), reference, batches)
    best_loss, _ = compare(reference, reference, batches)
    for name in missing:
        loss, divergence = compare(load(files[name]), reference, batches)
        gain = (base_loss - loss) / (base_loss - best_loss)
        rows[name] = {"gain": gain, "ratio": divergence / base_divergence}
        results.write_text(json.dumps(rows))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "original", "adapter", "calibration", "text", "work"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--types", nargs="+", default=["q4_k_m", "q4_0", "iq4_nl", "q6_k"])
    parser.add_argument("--bases", nargs="+", choices=["nf4", "gguf"], default=["nf4", "gguf"])
    parser.add_argument("--tokens", type=int, default=5120)
    work = Work(parser.parse_args(arguments))
    work.folder.mkdir(parents=True, exist_ok=True)
    print("| type | base | row | gain kept | KL ratio |\n|---|---|---|---|---|", flush=True)
    for kind in work.args.types:
        if "nf4" in work.args.bases:
            files = {row: work.from_folder(kind, row) for row in ("quantizer", "importance", "dequantized", "qmerge")}
            show(kind, "NF4", judge(work, work.args.base, files, work.folder / f"{kind}-nf4.json"))
        if "gguf" in work.args.bases:
            files = {row: work.from_gguf(kind, row) for row in ("again", "nearest", "kept")}
            show(kind, "GGUF", judge(work, work.gguf_base(kind), files, work.folder / f"{kind}-gguf.json"))


def show(kind: str, base: str, rows: Rows) -> None:
    """Print the rows of one type and base."""
    for name, row in rows.items():
        print(f"| {kind} | {base} | {name} | {row['gain']:.3f} | {row['ratio']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
