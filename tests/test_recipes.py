"""Every recipe in recipes/ runs as it stands, on small models put in place of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import qmerge.demo
from qmerge.recipe import Recipe, make_recipe, read_recipe
from qmerge.schema import read_report

from . import models
from .conftest import Cli
from .parity import bases
from .parity.bases.mlx import MlxModel

RECIPES = Path(__file__).parent.parent / "recipes"
DEMO = Path(qmerge.demo.__file__).parent
BASES: dict[str, str] = {
    "nf4-to-nf4": "nf4",
    "nf4-to-bf16": "nf4_dq",
    "bf16-to-mlx": "dense",
    "int8-to-int8": "int8",
    "fp16-base-trained-on-nf4": "dense",
    "nf4-to-gptq": "nf4",
    "gptq-to-gptq": "gptq",
    "two-adapters": "nf4",
}
"""Recipe → the fixture that is its kind of base."""

GGUF_RECIPES = ("nf4-to-q4_k_m-ollama", "gguf-to-gguf")
"""They need a tokenizer, which those models do not have: the demo model takes their place."""


def adapters(name: str, lora: Path) -> list[object]:
    """As many as the recipe has."""
    asked = read_recipe(RECIPES / f"{name}.yaml")["adapter"]
    return [part for _ in range(len(asked) if isinstance(asked, list) else 1) for part in ("--adapter", lora)]


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as gptqmodel packs it."""
    pytest.importorskip("gptqmodel")
    sizes = {name: models.LLAMA[name] for name in ("hidden_size", "intermediate_size")}
    return bases.make("gptq-g32", tmp_path_factory.mktemp("recipes") / "gptq", **sizes)


def test_every_recipe_has_a_base_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == BASES.keys() | set(GGUF_RECIPES)
    assert {path.suffix for path in RECIPES.iterdir()} == {".yaml"}


@pytest.mark.parametrize("name", BASES)
def test_runs_and_loads(name: str, request: pytest.FixtureRequest, lora: Path, tmp_path: Path, cli: Cli) -> None:
    base, out, path = request.getfixturevalue(BASES[name]), tmp_path / "out", RECIPES / f"{name}.yaml"
    # A random delta is of no typical size: whether enough is kept is not what is tested here.
    ran = cli("run", path, "--base", base, *adapters(name, lora), "--out", out, "--min-kept", -1)
    assert ran.code == 0, ran.err
    asked, report = read_recipe(path), read_report(out)
    assert report.recipe["target"] == asked["target"]
    assert report.actions["merge"] == len(models.LINEAR) * models.LLAMA["num_hidden_layers"]
    assert {name: report.recipe[name] for name in asked.keys() - {"base", "adapter", "out", "min_kept"}} == {
        name: value for name, value in asked.items() if name not in {"base", "adapter", "out", "min_kept"}
    }
    if asked["target"] == "mlx":
        pytest.importorskip("mlx_lm")
        assert torch.isfinite(models.logits(MlxModel(out))).all()  # type: ignore[arg-type]
        return
    model, info = AutoModelForCausalLM.from_pretrained(out, device_map="cpu", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.isfinite(models.logits(model)).all()


def test_gguf_recipes_run_one_after_the_other(tmp_path: Path, cli: Cli) -> None:
    """The file that the first one writes is the base of the second one."""
    pytest.importorskip("conversion")
    unchanged = shutil.copytree(DEMO / "adapter", tmp_path / "adapter")
    config = json.loads((unchanged / "adapter_config.json").read_text())
    (unchanged / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 1e-9}))
    base, adapter = DEMO / "base-nf4", unchanged
    for name in GGUF_RECIPES:
        out = tmp_path / name
        ran = cli("run", RECIPES / f"{name}.yaml", "--base", base, "--adapter", adapter, "--out", out,
                  "--rounding", "stochastic", "--min-kept", -1)  # fmt: skip
        assert ran.code == 0, ran.err
        assert {record.file for record in read_report(out).outputs} == {"model.gguf"}
        assert "FROM ./model.gguf" in (out / "Modelfile").read_text()
        base, adapter = out / "model.gguf", DEMO / "adapter"


@pytest.mark.parametrize("name", BASES)
def test_the_recipe_in_the_output_does_the_same_again(
    name: str, request: pytest.FixtureRequest, lora: Path, tmp_path: Path, cli: Cli
) -> None:
    base, first, second = request.getfixturevalue(BASES[name]), tmp_path / "first", tmp_path / "second"
    path = RECIPES / f"{name}.yaml"
    assert cli("run", path, "--base", base, *adapters(name, lora), "--out", first, "--min-kept", -1).code == 0
    assert cli("run", first / "qmerge_recipe.yaml", "--base", base, *adapters(name, lora), "--out", second).code == 0
    assert hashes(first) == hashes(second)


def hashes(out: Path) -> dict[str, str]:
    return {record.file: record.sha256 for record in read_report(out).outputs}


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\ntarget:", "\ntagret:", ("'tagret'", "Did you mean 'target'?")),
        ("\nmin_kept:", "\nmin-kept:", ("'min-kept'", "Did you mean 'min_kept'?")),
        ("\nout:", "\nout_shard_size: 1GB\nout:", ("'out_shard_size'", "There are: base, ")),
    ],
)
def test_unknown_keys_are_refused(
    name: str, old: str, new: str, words: tuple[str, ...], tmp_path: Path, cli: Cli
) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    assert old in text
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(text.replace(old, new))
    ran = cli("run", recipe, "--out", out)
    assert ran.code == 2
    assert all(word in ran.err for word in words), ran.err
    assert not out.exists()


@pytest.mark.parametrize("name", [*BASES, *GGUF_RECIPES])
def test_lines_that_are_commented_out_are_keys_too(name: str) -> None:
    """`# block_size: 64` must work when its # is taken away."""
    path = RECIPES / f"{name}.yaml"
    offered: dict[str, object] = {}
    for line in path.read_text().splitlines():
        if line.startswith("# ") and line[2:].split(":")[0] in Recipe.model_fields:
            offered |= yaml.safe_load(line[2:])
    make_recipe({**read_recipe(path), **offered})
