"""Merges into GGUF files, from Hugging Face folders and from GGUF bases. Oracles: gguf-py, transformers' GGUF loader, llama.cpp."""

from __future__ import annotations

import json
import re
import struct
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qmerge import hub
from qmerge.checkpoint.scan import scan
from qmerge.errors import AdapterError, CheckpointError, RecipeError
from qmerge.evaluation.llama_cpp import has_llama_cpp
from qmerge.evaluation.verify import verify
from qmerge.formats import MIXES
from qmerge.formats.gguf import in_file_order, in_model_order
from qmerge.gguf.base import parameter_shapes, read_gguf
from qmerge.gguf.converter import without_code
from qmerge.gguf.header import read_header
from qmerge.gguf.mapping import shortest_order, trace
from qmerge.gguf.output import types_of
from qmerge.gguf.tokenizer_file import read_tokenizer
from qmerge.recipe import make_recipe
from qmerge.report.describe.inspect import inspect
from qmerge.report.loading import FOLDER, name_model
from qmerge.run.merge_model import merge
from qmerge.safetensors_io.reader import Reader
from qmerge.weights.values import dense_values

from .. import models
from ..hub_server import HubServer
from .test_gguf import DEMO, KINDS, LLAMA3, distance, logits, make, stored
from .test_vocabulary import PRE, byte_level

gguf = pytest.importorskip("gguf")
pytest.importorskip("conversion")

FLOAT16_ERROR = 2e-3
"""Logits of these models (about 1 in size) with matrices in float16: 2**-11 per weight, over some products."""


def merged(base: Path, adapter: Path, out: Path, target: str, **settings: Any) -> Path:
    """The GGUF file that a merge writes."""
    settings = {"rounding": "nearest", **settings}
    merge(make_recipe({"base": str(base), "adapter": str(adapter), "target": target, "out": str(out), **settings}))
    return out / "model.gguf"


def with_adapter(folder: Path, place: Path, **settings: Any) -> Path:
    """A random adapter for the model in a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return models.adapter(model, place, **settings)


def unmerged_logits(folder: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return PeftModel.from_pretrained(model, adapter)(input_ids=torch.arange(40).view(2, 20) * 7).logits


def values_of(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Tensor → float32 values, by gguf-py."""
    return {name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for name, tensor in stored(file).items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random Llama and an adapter."""
    place = tmp_path_factory.mktemp("llama")
    folder = make(place / "model", hidden_size=256, intermediate_size=512)
    return folder, with_adapter(folder, place / "adapter")


# --- from a folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_unmerged_model_from_the_file(kind: str, tmp_path: Path) -> None:
    # Rows without a token are cut off in Gemma 3's files, and transformers does not load those.
    folder = make(tmp_path / "model", kind, **({"vocab_size": 770} if kind == "gemma3" else {}))
    adapter = with_adapter(folder, tmp_path / "adapter")
    expected = unmerged_logits(folder, adapter)
    file = merged(folder, adapter, tmp_path / "out", "gguf_f16")
    assert distance(logits(folder, file), expected) < FLOAT16_ERROR * float(expected.abs().max())
    # The adapter is in it: without it, the logits are others.
    assert distance(logits(folder), expected) > 20 * FLOAT16_ERROR


@pytest.mark.parametrize("target", ["q8_0", "q4_0", "q5_0", "q4_k_m", "q6_k", "iq4_nl", "iq4_xs", "q3_k_m"])
def test_every_mix_is_read_back_by_the_gguf_package(target: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    file = merged(folder, adapter, tmp_path / "out", target)
    with Reader() as reader:
        checkpoint = read_gguf(file, None)
        for name, weight in checkpoint.weights.items():
            place = checkpoint.mapped.places[name]
            found = dense_values(weight, reader, torch.device("cpu"))
            expected = torch.from_numpy(values_of(file)[place.tensor]).float()
            assert torch.equal(in_file_order(found.view(expected.shape), place.order), expected), name
    source = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted = (
        PeftModel.from_pretrained(source, adapter).merge_and_unload().state_dict()["model.layers.0.mlp.up_proj.weight"]
    )
    got = torch.from_numpy(values_of(file)["blk.0.ffn_up.weight"])
    relative = float((got - wanted).norm() / wanted.norm())
    assert relative < 0.17  # 3 bits
    assert all(check.ok for check in verify(tmp_path / "out", reload=False))


@pytest.mark.slow
@pytest.mark.skipif(not has_llama_cpp(), reason="llama.cpp (xllamacpp) is not installed")
@pytest.mark.parametrize("target", MIXES)
def test_llama_cpp_loads_it_and_answers_the_same(
    target: str, llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, adapter = llama
    merged(folder, adapter, tmp_path / "out", target)
    reload = verify(tmp_path / "out")[-1]
    assert reload.ok and "llama.cpp answers" in reload.found
    # Control: values that were read without the reordering of rows.
    monkeypatch.setattr("qmerge.formats.gguf.in_model_order", lambda rows, order: rows)
    reload = verify(tmp_path / "out")[-1]
    assert not reload.ok and "from those of the stored values" in reload.found


def test_experts_are_stacked_and_read_back(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        **{**models.LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 800}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    folder = make(tmp_path / "tokenizer").parent / "model"
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    adapter = models.adapter(model, tmp_path / "adapter", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    file = merged(folder, adapter, tmp_path / "out", "gguf_f16")
    weights = load_file(folder / "model.safetensors")
    found = values_of(file)["blk.1.ffn_up_exps.weight"]
    for expert in range(4):
        expected = weights[f"model.layers.1.block_sparse_moe.experts.{expert}.w3.weight"]
        assert np.array_equal(found[expert], expected.half().float().numpy())
    with Reader() as reader:
        name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
        weight = read_gguf(file, scan(folder, reader)).weights[name]
        assert torch.equal(dense_values(weight, reader, torch.device("cpu")), weights[name].half().float())


# --- from a GGUF base ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["q8_0", "q4_k_m", "q4_0"])
def test_nothing_but_codes_changes_on_a_gguf_base(target: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    base = merged(folder, adapter, tmp_path / "base", target)
    file = merged(base, with_adapter(folder, tmp_path / "other", seed=2), tmp_path / "out", "gguf")
    before, after = base.read_bytes(), file.read_bytes()
    header = read_header(base)
    start = min(header.offsets.values())
    assert (len(after), after[:start]) == (len(before), before[:start])
    touched = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    changed = 0
    for name, tensor in stored(file).items():
        is_same = np.array_equal(tensor.data, stored(base)[name].data)
        assert is_same or (name.startswith("blk.") and name.split(".")[2] in touched), name
        changed += not is_same
    assert changed > 0


def test_preserve_keeps_the_delta_that_nearest_loses(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = llama
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    small = models.adapter(model, tmp_path / "small", size=0.002)
    none = models.adapter(model, tmp_path / "none", size=0.0)
    base = merged(folder, none, tmp_path / "base", "q4_k_m")
    lost = merged(base, small, tmp_path / "lost", "gguf")
    kept = merged(base, small, tmp_path / "kept", "gguf", rounding="preserve", calibration="random")

    weights = load_file(small / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    delta = (2 * weights[name.format("B")] @ weights[name.format("A")]).numpy()  # alpha is twice the rank

    def share(file: Path) -> float:
        """Of the delta of one weight, in the stored values."""
        change = values_of(file)["blk.0.ffn_up.weight"] - values_of(base)["blk.0.ffn_up.weight"]
        return float((change * delta).sum() / (delta * delta).sum())

    assert abs(share(lost)) < 0.1 and 0.5 < share(kept) < 1.5


def test_a_gguf_base_merges_into_a_folder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    base = merged(folder, adapter, tmp_path / "base", "q8_0")
    adapter = with_adapter(folder, tmp_path / "other", seed=2)
    merge(make_recipe({"base": str(base), "adapter": str(adapter), "target": "fp32", "out": str(tmp_path / "out")}))
    dense = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = PeftModel.from_pretrained(dense, adapter)(input_ids=torch.arange(40).view(2, 20) * 7).logits
    assert distance(logits(tmp_path / "out"), expected) < 1e-4


# --- orders and names ------------------------------------------------------------------------------------------------


def test_orders_are_inverse_and_as_short_as_possible() -> None:
    order = tuple(row for pair in zip(range(4), range(4, 8), strict=True) for row in pair)
    whole = torch.tensor([*order, *(8 + row for row in order)])
    assert shortest_order(whole) == order
    assert shortest_order(torch.arange(16)) == ()
    assert shortest_order(torch.tensor([1, 0, 2])) == (1, 0, 2)
    rows = torch.arange(32).view(16, 2)
    assert torch.equal(in_file_order(rows, order), rows[whole])
    assert torch.equal(in_model_order(in_file_order(rows, order), order), rows)


def test_gemmas_norms_are_shifted_and_biases_are_not_taken_for_it(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "gemma2")
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    places = trace(folder, config, parameter_shapes(config)).places
    assert {place.shift for name, place in places.items() if "norm" in name} == {1.0}
    assert {place.shift for name, place in places.items() if "norm" not in name} == {0.0}


def test_a_file_on_the_hub_is_asked_for_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **settings: Any) -> str:
        asked.update(settings, id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("qmerge.hub.download.list_files", lambda hub_id, _: hub.Listing(hub_id, "c0ffee", ()))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/model-Q4_K_M.gguf").touch()
    with pytest.raises(CheckpointError, match="has no file other"):
        hub.resolve("owner/name-GGUF:other.gguf", None, CheckpointError)
    source = hub.resolve("owner/name-GGUF:sub/model-Q4_K_M.gguf", None, CheckpointError)
    assert (asked["id"], asked["allow_patterns"]) == ("owner/name-GGUF", ["sub/model-Q4_K_M.gguf"])
    assert source.file == tmp_path / "sub/model-Q4_K_M.gguf"


# --- errors ----------------------------------------------------------------------------------------------------------


def damaged(data: bytes, kind: str) -> bytes:
    if kind == "magic":
        return b"GGML" + data[4:]
    if kind == "version":
        return data[:4] + struct.pack("<I", 1) + data[8:]
    if kind == "counts":
        return data[:8] + struct.pack("<Q", 2**60) + data[16:]
    if kind == "header":
        return data[:2000]
    return data[:-1000]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("magic", "is not a GGUF file"),
        ("version", "GGUF version 1, expected 3"),
        ("counts", "announces"),
        ("header", "damaged or not whole"),
        ("end", "ends inside"),
    ],
)
def test_damaged_files_are_told_in_one_line(kind: str, message: str, llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    base = merged(folder, adapter, tmp_path / "base", "q8_0")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(damaged(base.read_bytes(), kind))
    with pytest.raises(CheckpointError, match=message) as caught:
        merged(bad, adapter, tmp_path / "out", "gguf")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_one_part_of_several_is_refused(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    base = merged(folder, adapter, tmp_path / "base", "q8_0")
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    with pytest.raises(CheckpointError, match="one part of 3"):
        read_header(tmp_path / "part.gguf")
    assert read_header(base).scalars["general.architecture"] == "llama"


def test_without_a_gguf_base_the_target_gguf_is_a_default_mix(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    one, other = (merged(folder, adapter, tmp_path / target, target) for target in ("gguf", "q4_k_m"))
    assert one.read_bytes() == other.read_bytes()


# --- values that the adapter trained as a whole ----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 5])
def test_trained_embeddings_are_in_the_file(rows: int, tmp_path: Path) -> None:
    """lm_head and embed_tokens as the adapter trained them, with some more tokens, too."""
    folder = make(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + rows)
    adapter = models.adapter(model, tmp_path / "adapter", modules_to_save=["lm_head", "embed_tokens"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name in tensors:
        if "lora" not in name:
            tensors[name] += 0.1
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    found = values_of(merged(folder, adapter, tmp_path / "out", "gguf_f16"))
    assert all(check.ok for check in verify(tmp_path / "out", reload=False))
    for name, tensor in {"lm_head": "output.weight", "embed_tokens": "token_embd.weight"}.items():
        (expected,) = [values for key, values in tensors.items() if key.endswith(f"{name}.weight")]
        assert np.array_equal(found[tensor], expected.half().float().numpy())
    with pytest.raises(RecipeError, match="keeps its tokenizer") if rows else nullcontext():
        base = merged(folder, with_adapter(folder, tmp_path / "other", seed=3), tmp_path / "base", "q8_0")
        merged(base, adapter, tmp_path / "again", "gguf")


def test_an_output_called_like_a_file_is_a_folder_with_that_file() -> None:
    assert make_recipe({"base": "b", "adapter": "a", "out": "tuned.gguf", "target": "q8_0"}).out == "tuned"
    assert make_recipe({"base": "b", "adapter": "a", "out": "gguf", "target": "q8_0"}).out == "gguf"


# --- adapters in llama.cpp's form ------------------------------------------------------------------------------------


def as_gguf(adapter: Path, out: Path, heads: int, kv_heads: int) -> Path:
    """An adapter as llama.cpp's convert_lora_to_gguf writes it: rows of q and k in its order, by its own code."""
    from conversion.llama import LlamaModel

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        values = tensor.float()
        if factor == "lora_B" and module.endswith(("q_proj", "k_proj")):
            values = LlamaModel.permute(values, heads, heads if module.endswith("q_proj") else kv_heads)
        writer.add_tensor(f"{names.get_name(module)}.weight.{factor.lower()}", values.contiguous().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    return out


def test_an_adapter_in_gguf_form_merges_like_the_folder(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    file = as_gguf(adapter, tmp_path / "lora.gguf", 4, 2)
    expected = merged(folder, adapter, tmp_path / "folder", "q8_0").read_bytes()
    assert merged(folder, file, tmp_path / "file", "q8_0").read_bytes() == expected
    control = as_gguf(adapter, tmp_path / "control.gguf", 2, 2)  # other heads: rows in another order
    assert merged(folder, control, tmp_path / "control", "q8_0").read_bytes() != expected
    with pytest.raises(AdapterError, match="expected a LoRA"):
        merged(folder, tmp_path / "file/model.gguf", tmp_path / "model-as-adapter", "q8_0")


def test_inspect_describes_a_file_from_its_header(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    file = merged(folder, adapter, tmp_path / "out", "q8_0")
    for reference in (file, file.parent):
        described = inspect(str(reference))
        assert described["architectures"] == ["llama (GGUF)"]
        assert described["formats"] == {"Q8_0": 16, "F32": 5}
        assert described["made_of"]["base"]["name"] == "model"
    assert "library_name: gguf" in (file.parent / "README.md").read_text()


def test_the_card_of_a_dense_file_says_how_to_load_it(hub: HubServer, llama: tuple[Path, Path], tmp_path: Path) -> None:
    """The programs for GGUF alone, with names of files that are there; the model is a merge, and not quantized."""
    folder, adapter = llama
    hub.add("someone/base", folder)
    hub.add("someone/lora", adapter)
    file = merged(Path("someone/base"), Path("someone/lora"), tmp_path / "out", "gguf_f16")
    card = (file.parent / "README.md").read_text()
    assert "library_name: gguf" in card and "\n- gguf_f16\n" in card and "base_model_relation: merge" in card
    here = re.findall(r"^\*\*(.+)\*\*:\n\n```sh\n([^`]+)\n```", card, re.MULTILINE)
    assert here == [
        ("Ollama", f"cd {FOLDER}\nollama create my-model -f Modelfile\nollama run my-model"),
        ("llama.cpp", f"llama-server -m {FOLDER}/model.gguf"),
        ("LM Studio", f"lms import {FOLDER}/model.gguf"),
    ]
    assert (file.parent / "Modelfile").read_text().startswith("FROM ./model.gguf\n") and "transformers" not in card
    on_hub = name_model(card, file.parent, "gguf_f16", "someone/model")
    assert "ollama run hf.co/someone/model\n" in on_hub and FOLDER not in on_hub
    assert "llama-server --hf-repo someone/model --hf-file model.gguf\n" in on_hub


def test_code_that_a_base_names_is_not_run(tmp_path: Path) -> None:
    """The converter allows it for this architecture."""
    folder = make(tmp_path / "model", "qwen2")
    adapter = with_adapter(folder, tmp_path / "adapter")
    marker = tmp_path / "ran"
    code = tmp_path / "code"
    code.mkdir()
    (code / "tok.py").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass T: pass\n")
    auto_map = {"AutoTokenizer": [None, f"{tmp_path}/code--tok.T"]}
    models.edit_json(folder / "config.json", architectures=["DreamModel"], auto_map=auto_map)
    models.edit_json(folder / "tokenizer_config.json", tokenizer_class="Foo", auto_map=auto_map)
    with suppress(CheckpointError):
        merged(folder, adapter, tmp_path / "out", "q8_0")
    assert not marker.exists()
    assert without_code({"a": [{"auto_map": 1, "b": 2}], "auto_map": {}}) == {"a": [{"b": 2}]}


def test_a_base_without_tokenizer_is_told_so(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="the base has no tokenizer"):
        merged(folder, with_adapter(folder, tmp_path / "adapter"), tmp_path / "out", "q8_0")


def test_scaled_rope_needs_the_original(tmp_path: Path) -> None:
    """transformers ignores the factors in the file: positions would be wrong."""
    folder = make(tmp_path / "model", rope_parameters=LLAMA3)
    base = merged(folder, with_adapter(folder, tmp_path / "adapter"), tmp_path / "base", "q8_0")
    other = with_adapter(folder, tmp_path / "other", seed=2)
    with pytest.raises(CheckpointError, match="scales its rotary embeddings"):
        merged(base, other, tmp_path / "out", "fp32")
    file = merged(base, other, tmp_path / "same", "gguf", original=str(folder))
    assert np.array_equal(values_of(file)["rope_freqs.weight"], values_of(base)["rope_freqs.weight"])
    merged(base, other, tmp_path / "dense", "fp32", original=str(folder))
    assert "rope_freqs.weight" not in load_file(tmp_path / "dense/model.safetensors")
    assert all(check.ok for check in verify(tmp_path / "base"))


def test_a_folder_with_several_files_asks_for_one(llama: tuple[Path, Path], tmp_path: Path) -> None:
    folder, adapter = llama
    base = merged(folder, adapter, tmp_path / "base", "q8_0")
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(base.read_bytes())
    with pytest.raises(CheckpointError, match=r"a\.gguf, b\.gguf: give one"):
        merged(tmp_path / "two", adapter, tmp_path / "out", "gguf")


def test_names_of_mixes_may_be_in_capitals() -> None:
    assert make_recipe({"base": "b", "adapter": "a", "out": "o", "target": "Q4_K_M"}).target == "q4_k_m"


def test_no_token_is_added_to_the_tokenizer_of_a_file(tmp_path: Path) -> None:
    """transformers adds <|endoftext|> to this one, for which the model has no row."""
    file = merged(DEMO / "base-nf4", DEMO / "adapter", tmp_path / "out", "q8_0")
    checkpoint = read_gguf(file, None)
    content = json.loads((checkpoint.folder / "tokenizer.json").read_text())
    ids = [*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])]
    assert max(ids) < checkpoint.config["vocab_size"] == 768


@pytest.mark.parametrize("pre", PRE)
def test_the_tokenizer_of_a_file_splits_text_as_the_bases(pre: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    byte_level(folder, pre)
    file = merged(folder, with_adapter(folder, tmp_path / "adapter"), tmp_path / "out", "q8_0")
    own, found = (read_tokenizer(place) for place in (folder, read_gguf(file, None).folder))
    assert found.pre_tokenizer_steps == own.pre_tokenizer_steps
    assert bool(found.model.get("ignore_merges")) == bool(own.model.get("ignore_merges"))


def test_constants_are_float32_whatever_the_mix(tmp_path: Path) -> None:
    """GPT-2's matrices are transposed, which is computed: their bytes are float32, so their type must be, too."""
    model = models.gpt2()
    folder = make(tmp_path / "tokenizer")
    values = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in values.items()}
    config = {**model.config.to_dict(), "architectures": ["GPT2LMHeadModel"], "n_ctx": 64}
    mapped = trace(folder, config, shapes, values=lambda name: values[name].detach())
    assert "blk.0.ffn_up.weight" in mapped.constants
    types = types_of("q4_0", mapped, mapped.scalars)
    assert {types[name] for name in mapped.constants} == {"F32"}
    assert types["token_embd.weight"] != "F32"
