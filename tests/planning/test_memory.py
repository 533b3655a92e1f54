"""Peak memory of whole processes: bounded by row blocks, whatever the size of the model or of its largest weight."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import save_file

from qmerge import run
from qmerge.formats._bnb4bit_kernels import packed_nibbles
from qmerge.planning.plan import make_plan
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader

from ..conftest import SERVER

pytestmark = pytest.mark.slow

HIDDEN, INNER, RANK = 1024, 2816, 4
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip
ADAPTED = ("self_attn.q_proj",)
MB = 2**20


def quantized(name: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """The tensors of an NF4 weight with random codes."""
    numel = shape[0] * shape[1]
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)})
    return {
        f"{name}.weight": torch.randint(256, (numel // 2, 1), dtype=torch.uint8),
        f"{name}.weight.absmax": torch.rand(numel // 64) * 0.1,
        f"{name}.weight.quant_map": bnb.get_4bit_type("nf4", device="cpu").clone(),
        f"{name}.weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
    }


def checkpoint(folder: Path, layers: int) -> Path:
    """An NF4 model with this number of layers, one file per layer."""
    folder.mkdir()
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        tensors: dict[str, torch.Tensor] = {}
        for name, shape in SHAPES.items():
            tensors.update(quantized(f"model.layers.{layer}.{name}", shape))
        file = f"model-{layer:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


def adapter(folder: Path, modules: dict[str, tuple[int, int]]) -> Path:
    folder.mkdir()
    tensors = {}
    for module, (rows, columns) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.1
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, RANK) * 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8}))
    return folder


def layers_of(count: int) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{n}.{name}": SHAPES[name] for n in range(count) for name in ADAPTED}


def merge_in_child(settings: dict[str, Any], pipe: Any) -> None:
    """Sends how far the peak of resident memory rose above what the process held at its start."""
    torch.set_num_threads(1)
    warm = torch.ones(64, 64) @ torch.ones(64, 64)
    packed_nibbles(torch.zeros(2, dtype=torch.uint8))  # the first kernel that numba loads takes 50 MB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert warm.sum() > 0
    run.merge(make_recipe(settings))
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)


def rise(**settings: Any) -> int:
    """Bytes by which a merge raises the peak of a process."""
    receiver, sender = SERVER.Pipe(duplex=False)
    process = SERVER.Process(target=merge_in_child, args=({"device": "cpu", "rounding": "nearest", **settings}, sender))
    process.start()
    sender.close()
    process.join(300)
    assert process.exitcode == 0
    return int(receiver.recv())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """63 MB of NF4, and an adapter."""
    tmp = tmp_path_factory.mktemp("small")
    return checkpoint(tmp / "base", 9), adapter(tmp / "adapter", layers_of(9))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Four times as many layers of the same shapes."""
    tmp = tmp_path_factory.mktemp("large")
    return checkpoint(tmp / "base", 36), adapter(tmp / "adapter", layers_of(36))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*"))


@pytest.mark.parametrize("target", ["nf4", "bf16"])
def test_four_times_the_model_takes_no_more_memory(
    small: tuple[Path, Path], large: tuple[Path, Path], target: str, tmp_path: Path
) -> None:
    one = rise(base=str(small[0]), adapter=str(small[1]), target=target, out=str(tmp_path / "small"))
    four = rise(base=str(large[0]), adapter=str(large[1]), target=target, out=str(tmp_path / "large"))
    # What may grow: the adapter, in float32, with its singular vectors and a factor kept; 10 kB of names, header and
    # measurements for each tensor; and 40 MB by which the peak of the same merge differs from run to run (the allocator).
    tensors = 27 * len(SHAPES) * 4
    allowed = 4 * (size(large[1]) - size(small[1])) + 10_000 * tensors + 40 * MB
    more = size(large[0]) - size(small[0])
    assert allowed < more / 3, "the test could not fail"
    assert four - one < allowed, f"{one / MB:.0f} MB, then {four / MB:.0f} MB; allowed {allowed / MB:.0f} MB more"


def test_peak_is_as_planned(small: tuple[Path, Path], tmp_path: Path) -> None:
    settings = {"base": str(small[0]), "adapter": str(small[1]), "target": "nf4", "out": str(tmp_path / "out")}
    with Reader() as reader:
        planned = make_plan(make_recipe({**settings, "device": "cpu"}), reader).peak_memory
    assert rise(**settings) < planned + 60 * MB  # code and tables of libraries that the first use brings in


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A bfloat16 embedding that is 420 MB in float32, and one small adapted layer."""
    tmp = tmp_path_factory.mktemp("wide")
    base = tmp / "base"
    base.mkdir()
    tensors = {
        "model.embed_tokens.weight": torch.randn(102_400, 1024, dtype=torch.bfloat16),
        "model.layers.0.self_attn.q_proj.weight": torch.randn(64, 1024, dtype=torch.bfloat16),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    return base, adapter(tmp / "adapter", {"model.layers.0.self_attn.q_proj": (64, 1024)})


def test_a_large_embedding_goes_in_row_blocks(wide: tuple[Path, Path], tmp_path: Path) -> None:
    whole = 102_400 * 1024 * 4
    settings = {"base": str(wide[0]), "adapter": str(wide[1]), "target": "fp16"}
    raised = rise(**settings, out=str(tmp_path / "out"))
    assert raised < whole / 2, f"{raised / MB:.0f} MB"
    tight = rise(**settings, out=str(tmp_path / "tight"), max_memory="20MB")
    assert tight < whole / 5, f"{tight / MB:.0f} MB"
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "tight" / "model.safetensors"
    ).read_bytes()


def test_a_weight_stays_within_max_memory(tmp_path: Path) -> None:
    """A merged weight of 16 M values: 64 MB in float32, and sixteen arrays of a block's size while it is merged."""
    base, shape = tmp_path / "base", (4096, 4096)
    base.mkdir()
    save_file(
        quantized("model.layers.0.self_attn.q_proj", shape), base / "model.safetensors", metadata={"format": "pt"}
    )
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": quantization}
    (base / "config.json").write_text(json.dumps(config))
    lora = adapter(tmp_path / "adapter", {"model.layers.0.self_attn.q_proj": shape})
    common = {"base": str(base), "adapter": str(lora), "target": "nf4"}
    rise(**common, out=str(tmp_path / "free"))
    tight = rise(**common, out=str(tmp_path / "tight"), max_memory="40MB")
    assert tight < 40_000_000 + 60 * MB, f"{tight / MB:.0f} MB"
    assert (tmp_path / "free" / "model.safetensors").read_bytes() == (
        tmp_path / "tight" / "model.safetensors"
    ).read_bytes()
