"""The files next to the weights: whose tokenizer, which licence, which files are copied and never run; and the model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from qmerge.checkpoint.folder import side_files
from qmerge.recipe import make_recipe
from qmerge.report.card import escape_markdown
from qmerge.run import merge
from qmerge.wording import percent

from ..models import edit_json


class Folders:
    """Copies of a base and an adapter whose side files a test writes."""

    def __init__(self, base: Path, adapter: Path, tmp: Path) -> None:
        self.base, self.adapter = shutil.copytree(base, tmp / "base"), shutil.copytree(adapter, tmp / "adapter")
        self.out = tmp / "out"

    def put(self, side: str, name: str, content: str) -> None:
        path = getattr(self, side) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def merged(self, **more: Any) -> Path:
        settings = {"base": str(self.base), "adapter": str(self.adapter), "target": "bf16", "out": str(self.out)}
        merge(make_recipe({**settings, "device": "cpu", **more}))
        return self.out

    def card(self, **more: Any) -> ModelCard:
        return ModelCard.load(self.merged(**more) / "README.md")


@pytest.fixture
def folders(dense: Path, lora: Path, tmp_path: Path) -> Folders:
    return Folders(dense, lora, tmp_path)


def test_tokenizer_and_template_of_the_adapter_win(folders: Folders) -> None:
    for side in ("base", "adapter"):
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
            folders.put(side, name, f'{{"of": "{side}"}}')
    folders.put("base", "vocab.json", '{"of": "base"}')
    folders.put("adapter", "added_tokens.json", '{"of": "adapter"}')
    out = folders.merged()
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "added_tokens.json",
    ):
        assert json.loads((out / name).read_text()) == {"of": "adapter"}, name
    assert json.loads((out / "vocab.json").read_text()) == {"of": "base"}


def test_all_side_files_of_the_base_where_the_adapter_has_none(folders: Folders) -> None:
    names = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE", "NOTICE.txt",
             "USE_POLICY.md", "preprocessor_config.json", "additional_chat_templates/tool.jinja"]  # fmt: skip
    for name in names:
        folders.put("base", name, f"content of {name}")
    out = folders.merged()
    for name in names:
        assert (out / name).read_text() == f"content of {name}"


def test_a_template_inside_the_adapters_tokenizer_config_wins(folders: Folders) -> None:
    """transformers prefers chat_template.jinja to tokenizer_config.json, so the base's file must not be copied."""
    folders.put("base", "chat_template.jinja", "base")
    folders.put("adapter", "tokenizer_config.json", '{"chat_template": "adapter"}')
    out = folders.merged()
    assert not (out / "chat_template.jinja").exists()
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "adapter"


def test_a_tokenizer_config_without_a_template_leaves_the_bases(folders: Folders) -> None:
    folders.put("base", "chat_template.jinja", "base")
    folders.put("adapter", "tokenizer_config.json", "{}")
    assert (folders.merged() / "chat_template.jinja").read_text() == "base"


def test_other_files_of_the_adapter_are_not_copied(folders: Folders) -> None:
    for name in ("LICENSE", "generation_config.json", "training_args.bin", "adapter.py", "README.md"):
        folders.put("adapter", name, "content of an adapter file")
    out = folders.merged()
    names = {path.name for path in out.iterdir()}
    assert not names & {
        "training_args.bin",
        "adapter.py",
        "adapter_config.json",
        "adapter_model.safetensors",
        "LICENSE",
    }
    assert "content of an adapter file" not in (out / "README.md").read_text()
    assert "content of an adapter file" not in (out / "generation_config.json").read_text()


def test_python_files_are_copied_and_not_run(folders: Folders, tmp_path: Path) -> None:
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    folders.put("base", "modeling_llama.py", bomb)
    folders.put("base", "configuration_custom.py", bomb)
    edit_json(folders.base / "config.json", auto_map={"AutoModelForCausalLM": "modeling_llama.Bomb"})
    out = folders.merged(target="nf4")  # transformers is asked which modules are linear layers
    assert (out / "modeling_llama.py").read_text() == bomb
    assert not (tmp_path / "ran").exists()


def test_templates_are_copied_and_not_rendered(folders: Folders) -> None:
    folders.put("base", "chat_template.jinja", "{{ 1/0 }}{{ ''.__class__.__mro__ }}")
    assert (folders.merged() / "chat_template.jinja").read_text() == "{{ 1/0 }}{{ ''.__class__.__mro__ }}"


def test_the_bases_card_and_other_weights_are_not_copied(folders: Folders) -> None:
    folders.put("base", "README.md", "# The base\n\nAll about the base.\n")
    for name in ("pytorch_model.bin", "model.gguf", "other.safetensors", "data.csv", "flax_model.msgpack"):
        folders.put("base", name, "x")
    out = folders.merged()
    assert "All about the base" not in (out / "README.md").read_text()
    names = {path.name for path in out.iterdir()}
    assert not names & {"pytorch_model.bin", "model.gguf", "other.safetensors", "data.csv", "flax_model.msgpack"}


def test_the_folder_is_complete_and_clean(folders: Folders) -> None:
    out = folders.merged()
    names = {path.name for path in out.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "README.md",
        "qmerge.json",
        "qmerge_recipe.yaml",
    } <= names
    assert not [name for name in names if name.startswith(".") or name.endswith(".partial")]


def test_side_files_that_are_folders_are_not_copied(folders: Folders) -> None:
    (folders.base / "tokenizer.json").mkdir()
    assert "tokenizer.json" not in side_files(folders.base, folders.adapter)


def test_a_tokenizer_config_that_is_not_json_is_copied(folders: Folders) -> None:
    folders.put("adapter", "tokenizer_config.json", "{")
    assert (folders.merged() / "tokenizer_config.json").read_text() == "{"


@pytest.mark.parametrize("content", ["[]", "null", '"chat_template"', "\xff"])
def test_a_tokenizer_config_that_is_not_an_object(folders: Folders, content: str) -> None:
    folders.put("adapter", "tokenizer_config.json", content)
    assert (folders.merged() / "tokenizer_config.json").exists()


# --- the card --------------------------------------------------------------------------------------------------------


def test_card_metadata(folders: Folders) -> None:
    folders.put(
        "base",
        "README.md",
        "---\nlicense: other\nlicense_name: mine\nlicense_link: LICENSE\nlanguage: de\n---\n# Base\n",
    )
    edit_json(folders.adapter / "adapter_config.json", base_model_name_or_path="someone/base")
    card = folders.card(target="nf4")
    data = card.data.to_dict()
    assert data["base_model"] == ["someone/base"]
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "mine", "LICENSE")
    assert {"qmerge", "qlora", "nf4", "bitsandbytes"} <= set(data["tags"])
    assert data["library_name"] == "transformers"
    assert data["language"] == ["de"]
    # As huggingface_hub itself would write it.
    assert (folders.out / "README.md").read_text().startswith(f"---\n{card.data.to_yaml()}\n---\n")


@pytest.mark.parametrize(
    "card", ["# no metadata", "---\n- a list\n---\n", "---\n: [\n---\n", "---\nlicense: null\n---\n"]
)
def test_a_base_with_an_unusable_card(folders: Folders, card: str) -> None:
    folders.put("base", "README.md", card)
    assert folders.card().data.license is None


def test_card_names_a_format_once(folders: Folders) -> None:
    assert folders.card(target="fp8").data.tags.count("fp8") == 1
    assert (folders.out / "README.md").read_text().count("- fp8\n") == 1


def test_card_of_a_dense_target_has_no_quantization_tag(folders: Folders) -> None:
    assert "bitsandbytes" not in folders.card().data.tags


def test_card_of_a_base_without_a_licence_has_none(folders: Folders) -> None:
    assert folders.card().data.license is None


def test_a_local_path_is_not_a_base_model(folders: Folders) -> None:
    edit_json(folders.adapter / "adapter_config.json", base_model_name_or_path="/home/me/secret/base")
    out = folders.merged()
    assert ModelCard.load(out / "README.md").data.base_model is None
    assert "secret" not in (out / "README.md").read_text()


def test_card_shows_what_survived(folders: Folders) -> None:
    card = folders.card()
    kept = json.loads((folders.out / "qmerge.json").read_text())["total"]["values"]["kept"]
    assert f"there is {percent(kept)} of the adapter's change" in card.text.replace("*", "")
    rows = [line.split("|") for line in card.text.splitlines() if line.startswith("| ")]
    assert {"q\\_proj", "**all**"} <= {row[1].strip() for row in rows}
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    "content",
    [
        "---\nlicense: [a, b]\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: mit\nlicense: mit\n---\n",
        "no metadata",
        "---\n",
        "---\n: {\n---\n",
        "",
    ],
)
def test_any_content_of_the_bases_card(folders: Folders, content: str) -> None:
    folders.put("base", "README.md", content)
    assert folders.card().data.library_name == "transformers"


def test_a_card_that_is_not_text(folders: Folders) -> None:
    (folders.base / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    assert folders.card().data.library_name == "transformers"


EVIL = "evil\x1b[2J\n# Big\n<script>alert(1)</script>|a|b|[link](javascript:x)`code`**bold**"


def test_names_are_escaped() -> None:
    escaped = escape_markdown(EVIL)
    assert escaped.isprintable() and "\n" not in escaped
    assert "\\<script\\>" in escaped and "\\|a\\|" in escaped and "\\[link\\]" in escaped
    assert escape_markdown("Llama-3.1-8B_nf4") == "Llama-3.1-8B\\_nf4"


@pytest.mark.parametrize(
    "name", ["<script>alert(1)<!--script>", "a|b|c", "**b**", "[x](javascript:y)", "\u202egnp.exe", "a\nb", "`x`"]
)
def test_folder_names_cannot_mark_up_the_card(folders: Folders, tmp_path: Path, name: str) -> None:
    folders.base = folders.base.rename(tmp_path / name)
    content = folders.merged().joinpath("README.md").read_text()
    assert all(c.isprintable() or c == "\n" for c in content)
    assert escape_markdown(name) in content
    body = content.split("---\n", 2)[2]
    for mark in ("<", "|", "*", "[", "`"):
        if mark in name:
            assert f"\\{mark}" in body
    heading = next(line for line in body.splitlines() if line.startswith("# "))
    assert "into" in heading


@pytest.mark.parametrize("name", ["<script>x", "a&b", '"q"', "\u202eevil"])
def test_names_cannot_mark_up_the_page(folders: Folders, tmp_path: Path, name: str) -> None:
    folders.base = folders.base.rename(tmp_path / name)
    page = folders.merged() / "qmerge.html"
    content = page.read_text()
    assert "<script>x" not in content and "\u202e" not in content


def test_the_recipe_next_to_the_model_is_the_one_that_ran(folders: Folders) -> None:
    from qmerge.recipe import read_recipe

    out = folders.merged(rounding="stochastic", seed=3)
    recipe = make_recipe(read_recipe(out / "qmerge_recipe.yaml"))
    assert (recipe.rounding, recipe.seed, recipe.target) == ("stochastic", 3, "bf16")


def test_hashes_in_the_report_are_those_of_the_files(folders: Folders) -> None:
    import hashlib

    out = folders.merged(max_shard_size="60kB")
    report = json.loads((out / "qmerge.json").read_text())
    assert len(report["outputs"]) > 1
    for record in report["outputs"]:
        content = (out / record["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (record["bytes"], record["sha256"])
    for entry in report["inputs"]:
        folder = folders.base if entry["role"] == "base" else folders.adapter
        for record in entry["files"]:
            assert hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest() == record["sha256"]


def test_index_is_that_of_the_stock_library(folders: Folders) -> None:
    from safetensors import safe_open

    out = folders.merged(max_shard_size="60kB")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = 0
    for file in sorted(out.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == file.name
                total += opened.get_tensor(name).nbytes
    assert not index["weight_map"] and index["metadata"]["total_size"] == total
