"""GGUF export, compared with transformers' GGUF loader and the gguf package."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmerge.errors import CheckpointError, DiskError, NumbersError, QmergeError, RecipeError, RoomError
from qmerge.gguf import export as export_module
from qmerge.gguf import families as gguf_families
from qmerge.gguf.export import export

from .. import models
from ..conftest import Cli, snapshot

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "qmerge/demo"
SIZE = 800
SMALL = {**models.LLAMA, "vocab_size": SIZE, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1}
GEMMA = {"tie_word_embeddings": True, "head_dim": 256, "sliding_window": 8}
KINDS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama-tied": (
        transformers.LlamaConfig,
        {"head_dim": 32, "tie_word_embeddings": True, "rms_norm_eps": 1e-4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 128}),  # the size that transformers' loader takes for granted
    "gemma2": (transformers.Gemma2Config, {**GEMMA, "num_hidden_layers": 4}),
    "gemma3": (transformers.Gemma3TextConfig, {**GEMMA, "num_hidden_layers": 7}),
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}


def make(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A random model of this architecture, norms included, with the tokenizer of the demo model."""
    config, more = KINDS[kind]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**{**SMALL, **more, **changes}))
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "norm" in name:
            parameter.data = parameter + noise * 0.2
        elif "embed" in name:
            parameter.data = noise * 0.5
        else:
            parameter.data = noise * 0.15
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "base-nf4" / name, folder)
    return folder


def logits(folder: Path, file: Path | None = None) -> torch.Tensor:
    """float32 [2, 20, V]: logits of a folder or of a GGUF file, by transformers."""
    source, settings = (file.parent, {"gguf_file": file.name}) if file else (folder, {})
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **settings).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(40).view(2, 20) * 7).logits


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def stored(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


# --- the model is the same -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_from_the_file(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", kind)
    written = export(folder, tmp_path / "model.gguf", "f32")
    assert (written.tensors.keys(), written.notes) == ({"f32"}, ())
    assert distance(logits(folder), logits(folder, written.file)) <= 1e-6


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("llama", {"permutes_qk": False}),
        ("qwen2", {"permutes_qk": True}),
        ("gemma2", {"norm_shift": 0.0}),
        ("gemma3", {"norm_shift": 0.0}),
    ],
)
def test_control_another_rule_changes_the_logits(
    kind: str, wrong: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "model", kind)
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    monkeypatch.setitem(gguf_families.FAMILIES, name, replace(gguf_families.FAMILIES[name], **wrong))
    written = export(folder, tmp_path / "model.gguf", "f32")
    assert distance(logits(folder), logits(folder, written.file)) > 0.1


def q_rows(file: Path) -> np.ndarray[Any, Any]:
    return np.asarray(stored(file)["blk.0.attn_q.weight"].data)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("type", export_module.TYPES)
def test_bytes_are_those_of_the_gguf_package(type: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama", dtype)
    file = export(folder, tmp_path / "model.gguf", type).file
    tensors, source = stored(file), load_file(folder / "model.safetensors")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert {names.get_name(name, (".weight",)) for name in source} == tensors.keys()
    for name, tensor in source.items():
        values = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:
            row = np.arange(len(values))  # of a head of 16: its halves, one row of each in turn
            plain, values = values, values[row // 16 * 16 + row % 2 * 8 + row % 16 // 2]
            assert not np.array_equal(plain, values)
        kind = gguf.GGMLQuantizationType[type.upper() if values.ndim > 1 else "F32"]
        found = tensors[names.get_name(name, (".weight",))]
        assert (found.tensor_type, found.shape.tolist()) == (kind, list(values.shape[::-1]))
        assert np.asarray(found.data).tobytes() == gguf.quants.quantize(values, kind).tobytes()


def test_q8_0_is_within_its_bound_and_computes_as_its_values(tmp_path: Path) -> None:
    """The bound is half a step, and the relative error of the float16 scale, 2^-11, on up to 127 steps. It is tight."""
    folder = make(tmp_path / "model")
    file = export(folder, tmp_path / "model.gguf", "q8_0").file
    source = load_file(folder / "model.safetensors")
    rounded = {}
    worst = 0.0
    for name, tensor in source.items():
        rounded[name] = tensor
        if tensor.ndim > 1:
            kind = gguf.GGMLQuantizationType.Q8_0
            rounded[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(tensor.numpy(), kind), kind))
            largest = tensor.view(-1, 32).abs().amax(1, keepdim=True)
            error = (rounded[name] - tensor).view(-1, 32).abs() / largest
            worst = max(worst, float(error.max()))
    bound = 0.5 / 127 + 2**-11
    assert 0.5 * bound < worst <= bound
    exact = logits(folder)
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    assert distance(logits(folder), logits(folder, file)) <= 1e-5
    assert distance(exact, logits(folder, file)) > 1e-3


def test_rows_that_are_not_whole_blocks_become_f16_with_a_note(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", intermediate_size=72)
    written = export(folder, tmp_path / "model.gguf", "q8_0")
    assert (written.tensors["f16"], written.tensors["q8_0"]) == (2, 14)
    assert "blk.0.ffn_down.weight" in written.notes[0] and "F16, not Q8_0" in written.notes[0]
    assert stored(written.file)["blk.0.ffn_down.weight"].tensor_type == gguf.GGMLQuantizationType.F16
    assert distance(logits(folder), logits(folder, written.file)) < 1


@pytest.mark.parametrize("type", ["f32", "q8_0"])
def test_the_size_of_blocks_and_files_changes_no_byte(
    type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "a/model")
    one = export(folder, tmp_path / "one.gguf", type).file
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "b/model", max_shard_size="100kB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "b/model")
    monkeypatch.setattr(export_module, "BLOCK_ENTRIES", 100)
    few = export(folder, tmp_path / "few.gguf", type).file
    assert one.read_bytes() == few.read_bytes()
    sharded = export(tmp_path / "b/model", tmp_path / "sharded.gguf", type).file
    assert len(list((tmp_path / "b/model").glob("*.safetensors"))) > 1
    parts = stored(sharded)
    assert all(np.array_equal(tensor.data, parts[name].data) for name, tensor in stored(one).items())


# --- hyperparameters -------------------------------------------------------------------------------------------------


def test_hyperparameters(tmp_path: Path) -> None:
    file = export(make(tmp_path / "my-model", "gemma2"), tmp_path / "model.gguf", "bf16").file
    found = fields(file)
    expected = {
        "context_length": 256, "embedding_length": 64, "block_count": 4, "feed_forward_length": 160, "vocab_size": SIZE,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 256, "attention.value_length": 256,
        "rope.dimension_count": 256, "rope.freq_base": 1e4, "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.sliding_window": 8, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    assert {name: found[f"gemma2.{name}"] for name in expected} == expected
    assert found["general.architecture"] == "gemma2" and found["general.name"] == "my-model"
    assert found["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16
    assert found["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_llama_3_scaling_gives_the_frequencies_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    folder = make(tmp_path / "model", rope_parameters=LLAMA3, head_dim=64)
    factors = torch.from_numpy(
        np.array(stored(export(folder, tmp_path / "m.gguf", "f16").file)["rope_freqs.weight"].data)
    )
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    assert torch.allclose(plain / factors, theirs, rtol=1e-6)
    assert not torch.allclose(plain, theirs, rtol=0.1)
    assert factors.min() == 1 and factors.max() == 8 and ((factors > 1) & (factors < 8)).any()


@pytest.mark.parametrize("rope", [LINEAR, YARN], ids=["linear", "yarn"])
def test_other_scalings_are_keys(rope: dict[str, Any], tmp_path: Path) -> None:
    found = fields(export(make(tmp_path / "model", "qwen2", rope_parameters=rope), tmp_path / "m.gguf", "f16").file)
    scaling = {name: value for name, value in found.items() if ".rope.scaling." in name}
    assert scaling.pop("qwen2.rope.scaling.type") == rope["rope_type"]
    assert scaling.pop("qwen2.rope.scaling.factor") == 4.0
    original = {} if rope is LINEAR else {"qwen2.rope.scaling.original_context_length": 64}
    assert scaling == original


def test_note_about_a_sliding_window_that_llama_cpp_lacks(tmp_path: Path) -> None:
    written = export(make(tmp_path / "model", "mistral", sliding_window=32), tmp_path / "m.gguf", "f16")
    assert "past 32 tokens" in written.notes[0]


# --- the demo model, by the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from qmerge import merge

    out = tmp_path_factory.mktemp("demo") / "merged"
    merge(base=str(DEMO / "base-nf4"), adapter=str(DEMO / "adapter"), target="bf16", rounding="nearest", out=str(out))
    return out


def test_the_demo_model_by_the_command(demo: Path, cli: Cli, tmp_path: Path) -> None:
    before, file = snapshot(demo), tmp_path / "demo.gguf"
    ran = cli("gguf", demo, "--out", file, "--type", "f32", "--json")
    assert (ran.code, ran.err) == (0, "")
    printed = json.loads(ran.out)
    assert printed["tokenizer"] == "gpt2, smollm, 768 tokens" and printed["nbytes"] == file.stat().st_size
    assert snapshot(demo) == before and sorted(tmp_path.iterdir()) == [file]
    assert distance(logits(demo), logits(demo, file)) <= 1e-5
    text = (DEMO / "heldout.txt").read_text()
    ours = AutoTokenizer.from_pretrained(demo)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours.eos_token_id == theirs.eos_token_id == 1
    assert "q8_0" in cli("gguf", demo, "--out", tmp_path / "q.gguf", "--type", "q8_0").out
    assert cli("gguf", demo, "--out", file, "--type", "f32").code == 2


# --- errors, and files that are left behind --------------------------------------------------------------------------


def no_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: models.edit_json(folder / "config.json", **changes)


def tokenizer(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: models.edit_json(folder / "tokenizer.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")

    return edit


DOWN = "model.layers.1.mlp.down_proj.weight"
REFUSED: list[tuple[Callable[[Path], object], type[QmergeError], str]] = [
    (config(quantization_config={"quant_method": "bitsandbytes"}), CheckpointError, r"quantized \(bitsandbytes\): merge"),
    (config(architectures=["PhiForCausalLM"]), CheckpointError, "PhiForCausalLM cannot .*--target bf16.*convert_hf_to_gguf.py"),
    (config(architectures=None), CheckpointError, "architectures is missing"),
    (config(hidden_act="gelu"), CheckpointError, "hidden_act is gelu, expected silu"),
    (config(attention_bias=True), CheckpointError, "attention_bias is True"),
    (config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), CheckpointError, "rope_type dynamic"),
    (config(rope_parameters={**YARN, "attention_factor": 1.5}), CheckpointError, "attention_factor.*cannot be exported"),
    (config(vocab_size=900), CheckpointError, r"embed_tokens.weight has shape \[800, 64\], but config.json asks for \[900, 64\]"),
    (config(num_hidden_layers=3), CheckpointError, "layers.2.*: missing"),
    (weights(lambda t: t.pop(DOWN)), CheckpointError, f"{DOWN}: missing"),
    (weights(lambda t: t.update({"model.extra": torch.ones(2)})), CheckpointError, "model.extra: cannot be exported"),
    (weights(lambda t: t.update({DOWN: t[DOWN].to(torch.int64)})), CheckpointError, "stored as raw"),
    (weights(lambda t: t[DOWN].view(-1)[5].fill_(float("nan"))), NumbersError, "blk.1.ffn_down.weight contains NaN"),
    (weights(lambda t: t[DOWN].view(-1)[5].fill_(65520.0)), NumbersError, "reaches 65520, but F16 ends at 65504"),
    (no_file("tokenizer.json"), CheckpointError, "no tokenizer: expected tokenizer.json"),
    (tokenizer(normalizer={"type": "Lowercase"}), RecipeError, "--pre NAME"),
    (tokenizer(model={"type": "Unigram"}), CheckpointError, "Unigram"),
    (tokenizer(model={}), CheckpointError, "is not as the tokenizers library"),
    (tokenizer(added_tokens=[{"id": 800, "content": "x"}]), CheckpointError, "ids up to 800"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "error", "message"), REFUSED, ids=[message[:30] for _, _, message in REFUSED])
def test_refused_models_leave_no_file(
    spoil: Callable[[Path], object], error: type[QmergeError], message: str, tmp_path: Path
) -> None:
    folder, out = make(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    spoil(folder)
    with pytest.raises(error, match=message):
        export(folder, out / "model.gguf", "f16")
    assert not list(out.iterdir())


def test_refused_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model")
    (tmp_path / "taken.gguf").write_text("mine")
    for out, type, message in [
        (tmp_path / "a.gguf", "q4_k_m", "expected one of f16, bf16, f32, q8_0"), (tmp_path, "f16", "is a folder"),
        (tmp_path / "taken.gguf", "f16", "exists: delete it"), (tmp_path / "no/a.gguf", "f16", "does not exist; make it first"),
    ]:  # fmt: skip
        with pytest.raises(RecipeError, match=message):
            export(folder, out, type)
    assert (tmp_path / "taken.gguf").read_text() == "mine"
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RecipeError, match=r'pip install "qmerge\[gguf\]"'):
        export(folder, tmp_path / "a.gguf", "f16")


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(errno.ENOSPC, "No space left"), RoomError),
        (OSError(errno.EROFS, "Read-only file system"), DiskError),
    ],
)
def test_an_interruption_leaves_nothing_behind(
    raised: BaseException, seen: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = make(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    (out / "model.gguf.partial").write_text("of a run that was killed")
    write = export_module.write_tensor
    names_meanwhile: list[str] = []

    def stop(package: Any, tensor: Any, *rest: Any) -> None:
        if tensor.name == "blk.1.ffn_up.weight":
            names_meanwhile.extend(path.name for path in out.iterdir())
            raise raised
        write(package, tensor, *rest)

    monkeypatch.setattr(export_module, "write_tensor", stop)
    with pytest.raises(seen):
        export(folder, out / "model.gguf", "f16")
    assert names_meanwhile == ["model.gguf.partial"] and not list(out.iterdir())
