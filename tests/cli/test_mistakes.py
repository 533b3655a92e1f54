"""What users give by mistake, and the line that says what to do: each with its exit code, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import qmerge.demo
from qmerge import plugins
from qmerge.cli.habits import hint
from qmerge.errors import RecipeError
from qmerge.formats import MIXES, _names, all_targets, get_target
from qmerge.hub import split_revision
from qmerge.recipe import make_recipe

from ..conftest import Cli
from ..models import edit_json

TEXT = "a calibration text"
DEMO = Path(qmerge.demo.__file__).parent


class Given(NamedTuple):
    base: Path
    adapter: Path
    tmp: Path

    def folder(self, name: str, **files: object) -> Path:
        """A folder with files; ``config_json`` for config.json. A dict is written as JSON, a tensor as a safetensors file."""
        folder = self.tmp / name
        folder.mkdir()
        for file, content in files.items():
            stem, _, ending = file.rpartition("_")
            path = folder / f"{stem}.{ending}"
            if isinstance(content, dict) and ending == "safetensors":
                save_file(content, path)
            else:
                path.write_text(json.dumps(content))
        return folder


DIFFUSERS = {"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": torch.zeros(4, 8)}


def merged(given: Given) -> Path:
    """A folder that looks like one that qmerge wrote."""
    folder = Path(shutil.copytree(given.base, given.tmp / "merged"))
    (folder / "qmerge.json").write_text("{}")
    return folder


def snapshots(given: Given) -> Path:
    shutil.copytree(given.base, given.tmp / "models--a--b/snapshots/abc")
    return given.tmp / "models--a--b"


def two_gguf_files(given: Given) -> Path:
    folder = given.folder("gguf")
    for name in ("m-q4.gguf", "m-q8.gguf"):
        (folder / name).write_bytes(b"GGUF")
    return folder


BASES: dict[str, tuple[Callable[[Given], object], tuple[str, ...]]] = {
    "an adapter": (lambda given: given.adapter, ("is an adapter, not a model", "--adapter", "without --base")),
    "a file": (lambda given: given.base / "model.safetensors", ("is a file", "give its folder")),
    "GGUF files": (two_gguf_files, ("m-q4.gguf, m-q8.gguf", "--base", "m-q4.gguf")),
    "a cache folder": (snapshots, ("Hub's cache", "snapshots/abc")),
    "the folder above": (lambda given: shutil.copytree(given.base, given.tmp / "a/b").parent, ("a/b has one",)),
    "Meta's form": (lambda given: given.folder("meta", params_json={}), ("params.json", "-hf")),
    "a pipeline": (lambda given: given.folder("sd", model_index_json={}), ("diffusers", "transformers")),
}
ADAPTERS: dict[str, tuple[Callable[[Given], object], tuple[str, ...]]] = {
    "a model": (lambda given: given.base, ("is a model, not an adapter", "--base", "qmerge extract")),
    "a merged model": (merged, ("a model that qmerge wrote", "merged into it already")),
    "a model of image LoRAs": (
        lambda given: given.folder("lora", pytorch_lora_weights_safetensors=DIFFUSERS),
        ("image model", "fuse_lora"),
    ),
    "a file of image LoRAs": (
        lambda given: given.folder("lora", style_safetensors=DIFFUSERS) / "style.safetensors",
        ("image model", "fuse_lora"),
    ),
    "MLX without config": (
        lambda given: given.folder("mlx", adapters_safetensors={"a": torch.zeros(1)}),
        ("adapter_config.json", "mlx_lm.lora's --adapter-path"),
    ),
    "old MLX": (lambda given: given.folder("mlx", adapters_npz={}), ("old mlx_lm", "mlx_lm.fuse")),
    "torchtune's .pt": (lambda given: given.folder("tune", adapter_0_pt={}), (".pt file", "save_adapter_weights_only")),
    "torchtune's model as .pt": (
        lambda given: given.folder("tune", hf_model_0001_0_pt={}),
        ("is a pickle, which is not opened", "safe_serialization: True"),
    ),
    "a training of the whole model": (
        lambda given: shutil.copytree(given.base, given.tmp / "run/checkpoint-30").parent,
        ("checkpoint-30 in it is a whole model", "run/checkpoint-30 BASE --out DIR"),
    ),
    "Trainer's state without adapter": (
        lambda given: given.folder("state", optimizer_pt={}),
        ("no adapter_config.json", "training folder"),
    ),
    "a folder of nothing": (lambda given: given.folder("nothing"), ("no adapter_config.json", "training folder")),
    "a text": (lambda given: given.folder("text", notes_txt={}) / "notes.txt", ("is a file", "adapter folder")),
}


@pytest.fixture
def given(dense: Path, lora: Path, tmp_path: Path) -> Given:
    return Given(dense, lora, tmp_path)


def check(cli: Cli, given: Given, base: object, adapter: object, words: tuple[str, ...]) -> None:
    ran = cli("--base", base, "--adapter", adapter, "--target", "nf4", "--out", given.tmp / "out", "--device", "cpu")
    assert ran.code == 3 and len(ran.err.splitlines()) == 1 and ran.err.startswith("qmerge: "), ran.err
    assert not [word for word in words if word not in ran.err], ran.err
    assert not (given.tmp / "out").exists()


@pytest.mark.parametrize("mistake", BASES)
def test_in_place_of_a_base(mistake: str, cli: Cli, given: Given) -> None:
    make, words = BASES[mistake]
    check(cli, given, make(given), given.adapter, words)


@pytest.mark.parametrize("mistake", ADAPTERS)
def test_in_place_of_an_adapter(mistake: str, cli: Cli, given: Given) -> None:
    make, words = ADAPTERS[mistake]
    check(cli, given, given.base, make(given), words)


@pytest.mark.parametrize("text", ["data/train.jsonl", "train.txt", "/no/such/train.jsonl"])
def test_a_calibration_file_that_is_not_there(text: str, cli: Cli, given: Given) -> None:
    """The file is looked for before the inputs are read, also where the rounding is chosen later."""
    asked = ("--base", given.base, "--adapter", given.adapter, "--target", "nf4", "--out", given.tmp / "out")
    ran = cli(*asked, "--calibration", text, "--device", "cpu")
    assert (
        ran.code == 2
        and ran.err == f"qmerge: calibration text {text}: no such file; give its path with --calibration FILE\n"
    )
    assert not (given.tmp / "out").exists()


def test_a_base_without_tokenizer(cli: Cli, given: Given) -> None:
    """The merge warns, and verify finds it; with a tokenizer, neither does."""
    asked = ("--adapter", given.adapter, "--target", "bf16", "--device", "cpu", "--merge-onto", "original")
    ran = cli("--base", given.base, *asked, "--out", given.tmp / "out")
    assert ran.code == 0 and "adapter has a tokenizer, none of tokenizer.json, tokenizer.model, " in ran.err
    checked = cli("verify", given.tmp / "out", "--no-reload")
    assert (
        checked.code == 0
        and "WARN   tokenizer: none of tokenizer.json, tokenizer.model, vocab.json, …: programs" in checked.out
    )
    base = Path(shutil.copytree(given.base, given.tmp / "base"))
    (base / "tokenizer_config.json").write_text("{}")
    ran = cli("--base", base, *asked, "--out", given.tmp / "with")
    assert ran.code == 0 and "tokenizer" not in ran.err
    assert "tokenizer:" not in cli("verify", given.tmp / "with", "--no-reload").out


@pytest.mark.parametrize("option", ["--calibration", "--verify"])
def test_a_text_without_a_tokenizer_is_refused_before_the_work(option: str, cli: Cli, given: Given) -> None:
    text = given.tmp / "text.txt"
    text.write_text("a few words")
    asked = ("--base", given.base, "--adapter", given.adapter, "--target", "nf4", "--out", given.tmp / "out")
    ran = cli(*asked, option, text, "--device", "cpu")
    assert ran.code == 3 and f"qmerge: no tokenizer in {given.base}, so no text can be read: copy" in ran.err
    assert "predicted" not in ran.err and not (given.tmp / "out").exists()


def test_a_calibration_text_of_another_form_is_refused_before_the_work(cli: Cli, given: Given) -> None:
    text = given.tmp / "text.jsonl"
    text.write_text('{"question": "a", "answer": "b"}')
    asked = ("--base", given.base, "--adapter", given.adapter, "--target", "nf4", "--out", given.tmp / "out")
    ran = cli(*asked, "--rounding", "auto", "--calibration", text, "--device", "cpu")
    assert ran.code == 2 and "text.jsonl, line 1: expected the fields of one of" in ran.err


@pytest.mark.parametrize("option", ["--calibration", "--verify"])
def test_chats_without_a_template_are_refused_before_the_work(option: str, cli: Cli, tmp_path: Path) -> None:
    text = tmp_path / "chats.jsonl"
    text.write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    asked = ("--base", DEMO / "base-nf4", "--adapter", DEMO / "adapter", "--target", "nf4", "--out", tmp_path / "out")
    ran = cli(*asked, option, text, "--device", "cpu")
    assert ran.code == 2 and "the tokenizer has no chat template" in ran.err and not (tmp_path / "out").exists()


def test_verify_names_the_folder_that_lacks_a_tokenizer(cli: Cli, given: Given) -> None:
    out, text = given.tmp / "out", given.tmp / "text.txt"
    text.write_text("a few words")
    asked = ("--base", given.base, "--adapter", given.adapter, "--target", "bf16", "--merge-onto", "original")
    assert cli(*asked, "--out", out, "--device", "cpu").code == 0
    ran = cli("verify", out, "--text", text, "--no-reload", "--against", given.base, given.adapter)
    assert ran.code == 3 and f"no tokenizer in {out}" in ran.out + ran.err


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("NF4", "nf4"), ("bnb", "nf4"), ("bnb-4bit", "nf4"), ("merged_4bit_forced", "nf4"), ("merged_4bit", "nf4"),
        ("merged_16bit", "bf16"),
        ("bfloat16", "bf16"), ("gptq-4bit", "gptq"), ("AWQ_4bit", "awq"), ("Q4_K_M", "q4_k_m"), ("q4km", "q4_k_m"),
        ("gguf-q5_k_m", "q5_k_m"), ("q8", "q8_0"), ("bnb_8bit", "int8"), ("float16", "fp16"),
    ],
)  # fmt: skip
def test_targets_by_the_names_of_other_tools(name: str, target: str) -> None:
    assert make_recipe({"base": "b", "adapter": "a", "target": name}).target == target


def test_every_name_of_another_tool_is_needed_and_leads_to_a_target() -> None:
    targets = (*MIXES, *plugins.names("formats"))
    plain = [_names._plain(word) for words in _names._SPELLINGS.values() for word in words.split()]
    assert set(_names._SPELLINGS) <= {*MIXES, *all_targets()}
    assert len(set(plain)) == len(plain) and not {_names._plain(target) for target in targets} & {*plain}
    assert not [name for name in _names._SEVERAL if _names._plain(name) != name or _names.known_target(name, targets)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("4bit", ("nf4", "w4a16", "gptq", "q4_k_m", "mlx")), ("int4", ("nf4", "w4a16")), ("8bit", ("fp8", "int8", "q8_0")),
        ("q4", ("q4_k_m", "q4_0")), ("f16", ("fp16", "gguf_f16")), ("gptq-8bit", ("--bits 8",)), ("vllm", ("w4a16", "fp8")),
        ("lora", ("unmerged",)), ("nf5", ("Did you mean 'nf4'? All targets: qmerge formats",)), ("hqq", ("There are:",)),
    ],
)  # fmt: skip
def test_names_that_may_mean_several_targets(name: str, words: tuple[str, ...], cli: Cli) -> None:
    ran = cli("--base", "b", "--adapter", "a", "--target", name, "--out", "o")
    assert ran.code == 2 and f"no target is called {name!r}" in ran.err
    assert not [word for word in words if word not in ran.err]


def test_every_target_has_its_own_name() -> None:
    assert [get_target(name.upper()).info.name for name in all_targets()] == list(all_targets())


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("https://huggingface.co/owner/na.me", ("owner/na.me", None)),
        ("https://huggingface.co/owner/name/tree/v2", ("owner/name", "v2")),
        ("https://hf.co/owner/name/tree/main/checkpoint-3=0.7", ("owner/name#checkpoint-3=0.7", None)),
        ("https://huggingface.co/owner/name/blob/main/m-q4.gguf", ("owner/name:m-q4.gguf", None)),
        ("https://huggingface.co/o/n/resolve/abc/adapter_model.safetensors?download=true", ("o/n", "abc")),
        ("https://huggingface.co/o/n?library=peft=0.5", ("o/n=0.5", None)),
        ("https://huggingface.co/owner/name#math", ("owner/name#math", None)),
        ("huggingface.co/owner/name", ("owner/name", None)),
        ("hf.co/owner/name/tree/v2", ("owner/name", "v2")),
        ("hf://owner/name", ("owner/name", None)),
        ("hf://owner/name@v2", ("owner/name", "v2")),
        ("https://example.com/owner/name", ("https://example.com/owner/name", None)),
        ("./name", ("./name", None)),
        (f"hf.co/{'a' * 300}/b", (f"{'a' * 300}/b", None)),
    ],
)
def test_addresses_on_the_hub(address: str, expected: tuple[str, str | None]) -> None:
    assert split_revision(address) == expected


def test_a_folder_with_the_name_of_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf.co/owner/name").mkdir(parents=True)
    assert split_revision("hf.co/owner/name") == ("hf.co/owner/name", None)


def test_addresses_in_a_recipe() -> None:
    site = "https://huggingface.co"
    recipe = make_recipe({"base": f"{site}/a/b/tree/v2", "adapter": [f"{site}/c/d=0.5", "e"], "target": "nf4"})
    assert (recipe.base, recipe.revision, recipe.adapter) == ("a/b", "v2", ["c/d=0.5", "e"])
    with pytest.raises(RecipeError, match="two revisions are given, v2 in its name and v3"):
        make_recipe({"base": f"{site}/a/b/tree/v2", "revision": "v3", "adapter": "e", "target": "nf4"})


# --- options -----------------------------------------------------------------------------------------------------------


FOUR_BITS = "--trained-on nf4-dq (if training loaded the base in 4 bits) or --target nf4 (for a 4-bit model)"


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (("--lora", "x"), "--adapter"), (("--model", "x"), "--base"), (("--model_name_or_path", "x"), "--base"),
        (("--output", "x"), "--out"), (("--output-dir=x",), "--out"), (("-o", "x"), "--out"), (("--quantize", "x"), "--target"),
        (("plan", "--quantization", "x"), "--target"), (("merge", "--save-method", "x"), "--target"),
        (("measure", "--device-map", "auto"), "--device"), (("run", "--load-in-4bit"), FOUR_BITS),
        (("--max_memory", "3GB"), "--max-memory"), (("verify", "--loadr", "x"), "--loader"), (("-V",), "--version"),
    ],
)  # fmt: skip
def test_options_from_habit(arguments: tuple[str, ...], ours: str, cli: Cli) -> None:
    ran = cli(*arguments)
    assert (
        ran.code == 2 and ran.err.startswith("qmerge: no such option -") and ran.err.endswith(f"did you mean {ours}?\n")
    )


@pytest.mark.parametrize(
    ("arguments", "ours"),
    [
        (("inspect", "--adapter", "my-run"), "qmerge inspect my-run"),
        (("verify", "--out", "merged", "--text", "a.txt"), "qmerge verify merged"),
        (("verify", "--model-path=merged"), "qmerge verify DIR"),
        (("push", "--out", "merged", "me/model"), "qmerge push OUT ID"),
    ],
)
def test_folders_that_need_no_option(arguments: tuple[str, ...], ours: str, cli: Cli) -> None:
    ran = cli(*arguments)
    assert ran.code == 2 and ran.err.endswith(f": give it without an option: {ours}\n")


def test_a_number_of_bits_without_a_target(cli: Cli) -> None:
    ran = cli("--adapter", "a", "--bits", "4", "--out", "o")
    assert ran.code == 2 and len(ran.err.splitlines()) == 1
    assert not [word for word in ("--target", "nf4", "w4a16", "q4_k_m") if word not in ran.err]


def test_options_without_a_counterpart(cli: Cli) -> None:
    assert "runs no code of a model" in cli("merge", "--trust-remote-code").err
    assert "qmerge --help-all lists all of them" in cli("--zzzzzz").err
    assert "qmerge inspect --help lists all of them" in cli("inspect", "--zzzzzz", "x").err
    assert "--quiet shows less" in cli("-v").err and "qmerge run FILE" in cli("--cfg", "x").err
    assert hint("--lora", ()) == ""


def test_an_adapter_in_place_of_a_command(cli: Cli, lora: Path) -> None:
    ran = cli(lora, "--target", "nf4")
    assert ran.code == 2 and f"to merge this adapter, qmerge --adapter {lora}" in ran.err
    assert "Did you mean 'measure'?" in cli("mesure").err


def test_a_model_in_place_of_a_command(cli: Cli, given: Given) -> None:
    assert f"into this model, qmerge --base {given.base} --adapter DIR" in cli(given.base, given.adapter, "out").err
    folder = merged(given)
    assert cli(folder).err.endswith(f"to check this merged model, qmerge verify {folder}\n")


@pytest.mark.parametrize("name", ["my.yaml", "recipes/my.yml"])
def test_a_recipe_in_place_of_a_command(name: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the file is there or not: it is not taken for an adapter."""
    monkeypatch.chdir(tmp_path)
    for exists in (False, True):
        if exists:
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
        assert cli(name).err == f"qmerge: {name} is not a command: a recipe is run with qmerge run FILE\n"


def test_config_of_an_adapter_with_an_odd_base(cli: Cli, given: Given) -> None:
    """The name in the message is what the file says, made harmless."""
    adapter = Path(shutil.copytree(given.adapter, given.tmp / "adapter"))
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="a/b\u001b[31m")
    check(cli, given, adapter, given.adapter, ("is an adapter", "(a/b[31m)"))
