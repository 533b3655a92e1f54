"""Every recipe in recipes/ runs as it stands, on small models put in place of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import qmerge.demo
from qmerge.cli import recipe_file
from qmerge.recipe import Recipe, make_recipe, read_recipe
from qmerge.schema import read_report

from . import models
from .conftest import Cli
from .parity import bases
from .parity.bases.mlx import MlxModel

RECIPES = Path(__file__).parent.parent / "recipes"
DEMO = Path(qmerge.demo.__file__).parent
BASES: dict[str, str] = {
    "nf4-keep-4bit": "nf4",
    "nf4-to-bf16": "nf4_dq",
    "bf16-to-mlx": "dense",
    "int8-to-int8": "int8",
    "fp16-base-trained-on-nf4": "dense",
    "nf4-to-gptq-vllm": "nf4",
    "gptq-to-gptq": "gptq",
    "two-adapters-ties": "nf4",
    "dora": "nf4",
    "moe": "moe",
    "colab-t4": "demo_base",
    "many-machines": "nf4",
}
"""Recipe → the fixture that is its kind of base."""

ADAPTERS = {"dora": "dora", "moe": "moe_lora", "colab-t4": "demo_adapter"}
"""Recipe → the fixture that is its kind of adapter; ``lora`` for all others."""

SHORTER = {"colab-t4": ("--calibration-tokens", 512, "--sequence-length", 64)}
"""Recipe → options that only save time."""

REPLAYED = ("nf4-keep-4bit", "two-adapters-ties", "moe")
"""Recipes whose outputs are made again from the recipe inside them: one adapter, two, and a mixture of experts."""

GGUF_RECIPES = ("nf4-to-gguf-ollama", "gguf-to-gguf")
"""They need a tokenizer, which those models do not have: the demo model takes their place."""

SCHEMA = json.loads((RECIPES.parent / "docs/recipe.schema.json").read_text())

DEMO_LAYERS = 4
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "head_dim": 16}


@dataclass(frozen=True)
class Inputs:
    """What takes the place of a recipe's own inputs."""

    base: Path
    adapter: list[object]
    """As options; as many as the recipe has."""


@pytest.fixture
def inputs(request: pytest.FixtureRequest) -> Callable[[str], Inputs]:
    def of(name: str) -> Inputs:
        adapter = request.getfixturevalue(ADAPTERS.get(name, "lora"))
        return Inputs(request.getfixturevalue(BASES[name]), adapters(name, adapter))

    return of


def adapters(name: str, lora: Path) -> list[object]:
    asked = read_recipe(RECIPES / f"{name}.yaml")["adapter"]
    return [part for _ in range(len(asked) if isinstance(asked, list) else 1) for part in ("--adapter", lora)]


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as gptqmodel packs it."""
    pytest.importorskip("gptqmodel")
    sizes = {name: models.LLAMA[name] for name in ("hidden_size", "intermediate_size")}
    return bases.make("gptq-g32", tmp_path_factory.mktemp("recipes") / "gptq", **sizes)


@pytest.fixture(scope="module")
def dora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.adapter(models.llama(torch.float32), tmp_path_factory.mktemp("recipes") / "dora", use_dora=True)


@pytest.fixture
def demo_base() -> Path:
    """With a tokenizer, which a recipe that names a text needs."""
    return DEMO / "base-nf4"


@pytest.fixture
def demo_adapter() -> Path:
    return DEMO / "adapter"


def _moe(dtype: torch.dtype) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**models.LLAMA, **EXPERTS)).to(dtype).eval()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 mixture of experts: on disk, each expert is a matrix of its own."""
    return models.save(_moe(torch.bfloat16), tmp_path_factory.mktemp("recipes") / "moe")


@pytest.fixture(scope="module")
def moe_lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA on attention and on the stacks of experts that transformers has in memory."""
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = tmp_path_factory.mktemp("recipes") / "moe-lora"
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return models.adapter(_moe(torch.float32), folder, target_modules=attention, target_parameters=stacks)


def test_every_recipe_has_a_base_here() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} == BASES.keys() | set(GGUF_RECIPES)
    assert {path.suffix for path in RECIPES.iterdir()} == {".yaml"}


@pytest.mark.parametrize("name", BASES)
def test_runs_and_loads(name: str, inputs: Callable[[str], Inputs], tmp_path: Path, cli: Cli) -> None:
    given, out, path = inputs(name), tmp_path / "out", RECIPES / f"{name}.yaml"
    # A random delta is of no typical size: whether enough is kept is not what is tested here.
    ran = cli("run", path, "--base", given.base, *given.adapter, "--out", out, "--min-kept", -1, *SHORTER.get(name, ()))
    assert ran.code == 0, ran.err
    asked, report = read_recipe(path), read_report(out)
    assert report.recipe["target"] == asked["target"]
    assert report.actions["merge"] == merged_weights(name)
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
    models.edit_json(unchanged / "adapter_config.json", lora_alpha=1e-9)
    base, adapter = DEMO / "base-nf4", unchanged
    for name in GGUF_RECIPES:
        out = tmp_path / name
        ran = cli("run", RECIPES / f"{name}.yaml", "--base", base, "--adapter", adapter, "--out", out,
                  "--rounding", "stochastic", "--min-kept", -1)  # fmt: skip
        assert ran.code == 0, ran.err
        assert {record.file for record in read_report(out).outputs} == {"model.gguf"}
        assert "FROM ./model.gguf" in (out / "Modelfile").read_text()
        base, adapter = out / "model.gguf", DEMO / "adapter"


def merged_weights(name: str) -> int:
    """How many weights of the base change. Experts count one by one: gate, up and down of each."""
    per_layer = 4 + 3 * EXPERTS["num_experts"] if name == "moe" else len(models.LINEAR)
    return per_layer * (DEMO_LAYERS if BASES[name] == "demo_base" else models.LLAMA["num_hidden_layers"])


@pytest.mark.parametrize("name", REPLAYED)
def test_the_recipe_in_the_output_does_the_same_again(
    name: str, inputs: Callable[[str], Inputs], tmp_path: Path, cli: Cli
) -> None:
    given, first, second = inputs(name), tmp_path / "first", tmp_path / "second"
    path = RECIPES / f"{name}.yaml"
    assert cli("run", path, "--base", given.base, *given.adapter, "--out", first, "--min-kept", -1).code == 0
    again = cli("run", first / "qmerge_recipe.yaml", "--base", given.base, *given.adapter, "--out", second)
    assert again.code == 0, again.err
    assert hashes(first) == hashes(second)


def test_many_machines_runs_in_parts(inputs: Callable[[str], Inputs], tmp_path: Path, cli: Cli) -> None:
    """As its comments say: one command per part, in any order, then finalize."""
    given, out = inputs("many-machines"), tmp_path / "out"
    small = ["--out", out, "--max-shard-size", "40kB", "--min-kept", -1]
    for part in ("2/2", "1/2"):
        path = RECIPES / "many-machines.yaml"
        ran = cli("run", path, "--base", given.base, *given.adapter, *small, "--shard", part)
        assert ran.code == 0, ran.err
    assert cli("finalize", out).code == 0
    assert read_report(out).actions["merge"] == merged_weights("many-machines")


def hashes(out: Path) -> dict[str, str]:
    return {record.file: record.sha256 for record in read_report(out).outputs}


@pytest.mark.parametrize("name", ["nf4-keep-4bit", "two-adapters-ties"])
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


# --- the JSON schema -------------------------------------------------------------------------------------------------


def test_schema_in_docs_is_the_programs(cli: Cli) -> None:
    """To write it again: qmerge recipe --schema > docs/recipe.schema.json."""
    assert json.loads(cli("recipe", "--schema").out) == SCHEMA
    assert all(field["description"] for field in SCHEMA["properties"].values())


@pytest.mark.parametrize("name", [*BASES, *GGUF_RECIPES])
def test_recipe_names_the_schema_and_fits_it(name: str) -> None:
    path = RECIPES / f"{name}.yaml"
    assert path.read_text().splitlines()[0] == recipe_file.SCHEMA_LINE
    jsonschema.validate(read_recipe(path), SCHEMA)
    with pytest.raises(jsonschema.ValidationError, match="tagret"):
        jsonschema.validate({**read_recipe(path), "tagret": "nf4"}, SCHEMA)


def test_schema_offers_targets_and_takes_other_names() -> None:
    target = SCHEMA["properties"]["target"]
    assert {"nf4", "gptq", "q4_k_m", "auto"} <= set(target["anyOf"][0]["enum"])
    jsonschema.validate("NF4", target)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(4, target)


def test_printed_recipe_has_every_option_and_works(tmp_path: Path, cli: Cli) -> None:
    printed = tmp_path / "recipe.yaml"
    printed.write_text(cli("recipe").out)
    written = read_recipe(printed)
    assert set(written) == set(recipe_file.EXAMPLES)
    lines = [line.removeprefix("# ") for line in printed.read_text().splitlines()]
    assert not [name for name in Recipe.model_fields if not any(line.startswith(f"{name}:") for line in lines)]
    assert make_recipe(written) == make_recipe(recipe_file.EXAMPLES)
