"""Recipes: defaults, sizes, YAML there and back, and what is said about typing errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qmerge.errors import RecipeError
from qmerge.recipe import TRAINED_ON, Recipe, make_recipe, parse_size, read_recipe

LEAST = {"base": "a/b", "adapter": "c/d", "target": "nf4"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("5gb", 5 * 10**9), ("5 GB", 5 * 10**9), ("5G", 5 * 10**9), ("1.5MB", 1_500_000),
        ("512MiB", 512 * 2**20),
        ("2kB", 2000), ("2KiB", 2048), ("1TB", 10**12), ("1TiB", 2**40), ("100", 100), ("100B", 100), (" 7 kb ", 7000),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5XB", "-5GB", "5,5GB", "5GBps", "0", "0GB", "0.0MB", "1e9", "inf", "nan", "5 i"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="size"):
        parse_size(text)


# Without ~user, whose home folder may not exist, and owner/name@revision, which becomes two settings.
TEXTS = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="~@"), min_size=1, max_size=20)
SETTINGS = st.fixed_dictionaries(
    {"base": TEXTS, "adapter": TEXTS, "target": st.sampled_from(["nf4", "fp4", "int8", "fp16", "bf16", "fp32"])},
    optional={
        "revision": TEXTS,
        "adapter_revision": TEXTS,
        "out": TEXTS,
        "rounding": st.sampled_from(["auto", "nearest", "stochastic", "preserve"]),
        "trained_on": st.sampled_from(sorted(TRAINED_ON)),
        "block_size": st.sampled_from([32, 64, 4096]),
        "double_quant": st.booleans(),
        "quant_storage": st.sampled_from(["uint8", "bfloat16"]),
        "seed": st.integers(0, 2**63 - 1),
        "device": st.sampled_from(["auto", "cpu", "cuda"]),
        "workers": st.one_of(st.integers(1, 256), st.just("ray")),
        "max_memory": st.sampled_from(["1GB", "512MiB", "100"]),
        "min_kept": st.floats(-1, 1),
        "max_kl_ratio": st.floats(0, 2),
    },
)


@given(SETTINGS)
def test_yaml_there_and_back(settings: dict[str, Any]) -> None:
    """What is written beside the model makes the same recipe again, names like ``no``, ``1`` or ``null`` included."""
    recipe = make_recipe(settings)
    assert make_recipe(yaml.safe_load(recipe.to_yaml())) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize(
    "name", ["no", "1", "null", "~", "1.0", "yes", "2001-01-01", "a: b", "- a", "#a", "ä/ö", "'", '"', "!!x"]
)
def test_yaml_of_names_that_yaml_reads_as_something_else(name: str) -> None:
    recipe = make_recipe({**LEAST, "base": name})
    assert make_recipe(yaml.safe_load(recipe.to_yaml())).base == name


def test_yaml_holds_every_default_so_that_a_later_version_makes_the_same_model() -> None:
    written = yaml.safe_load(make_recipe(LEAST).to_yaml())
    assert written.items() >= LEAST.items() and written["rounding"] == "auto" and written["seed"] == 0
    assert make_recipe(written) == make_recipe(LEAST)


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make_recipe(LEAST).target = "bf16"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targt": "nf4"}, ["unknown key 'targt'", "Did you mean 'target'?", "There are: base"]),
        ({"block-size": 64}, ["unknown key 'block-size'", "Did you mean 'block_size'?"]),
        ({"zzz": 1}, ["unknown key 'zzz'", "There are: base"]),
        ({"target": "nf5"}, ["'nf5'", "Did you mean 'nf4'?"]),
        ({"target": "NF5"}, ["'NF5'", "Did you mean 'nf4'?"]),
        ({"target": "gptqq"}, ["'gptqq'", "Did you mean 'gptq'", "qmerge formats"]),
        ({"rounding": "neerest"}, ["'neerest'", "Did you mean 'nearest'?"]),
        ({"trained_on": "nf4_dq"}, ["trained_on", "nf4-dq", "'nf4_dq'"]),
        ({"merge_onto": "base"}, ["merge_onto", "'dequantized'", "'original'"]),
        ({"workers": 0}, ["workers", "from 1 to 256, or ray", "0"]),
        ({"workers": "many"}, ["workers", "from 1 to 256, or ray", "'many'"]),
        ({"seed": -1}, ["seed", "-1"]),
        ({"max_kl_ratio": -0.1}, ["max_kl_ratio", "greater than or equal to 0"]),
        ({"min_kept": 2}, ["min_kept", "less than or equal to 1"]),
        ({"max_memory": "much"}, ["'much'", "5GB"]),
        ({"trained_on": "nf4", "original": "x/y", "merge_onto": "original"}, ["trained_on", "original"]),
        ({"original": "x/y", "rounding": "nearest"}, ["merge_onto", "--rounding preserve"]),
        ({"base": None}, ["base"]),
        ({"adapter": 3}, ["adapter"]),
    ],
)
def test_what_is_said_about_mistakes(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({**LEAST, **changes})
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


@pytest.mark.parametrize("name", ["adapter", "target"])
def test_what_is_missing_is_explained(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{name} is needed \(--{name}\): .{{10,}}"):
        make_recipe({key: value for key, value in LEAST.items() if key != name})


def test_a_typing_error_is_named_before_what_it_leaves_missing() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'adapter'"):
        make_recipe({"base": "a", "adpter": "b", "target": "nf4"})


def test_every_field_is_described() -> None:
    assert not [name for name, field in Recipe.model_fields.items() if not field.description]


def test_where_the_work_is_done_is_no_part_of_the_identity() -> None:
    one = make_recipe({**LEAST, "out": "x", "workers": 1, "max_memory": "1GB"})
    two = make_recipe({**LEAST, "out": "y", "workers": 8, "max_memory": "2GB", "min_kept": 0.5, "max_kl_ratio": 0.1})
    assert one.identity() == two.identity()
    for changes in (
        {"seed": 1},
        {"rounding": "stochastic"},
        {"target": "fp4"},
        {"max_shard_size": "1GB"},
        {"block_size": 32},
    ):
        assert make_recipe({**LEAST, **changes}).identity() != one.identity()


def test_a_recipe_may_have_comments_and_unicode(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# mine\nbase: modèle\nadapter: b\ntarget: nf4  # four bits\n", encoding="utf-8")
    assert read_recipe(path)["base"] == "modèle"


def test_paths_may_be_given_as_such() -> None:
    given = {
        "base": Path("a/b"),
        "adapter": Path("c/d"),
        "out": Path("e"),
        "original": Path("f"),
        "calibration": Path("g"),
    }
    recipe = make_recipe({**LEAST, **given})
    assert recipe == make_recipe({**LEAST, **{name: str(path) for name, path in given.items()}})
    assert make_recipe({**LEAST, "adapter": (Path("c"), "d=0.5")}).adapters == [("c", 1.0), ("d", 0.5)]


def test_duplicate_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("base: a\ntarget: nf4\nbase: b\n")
    with pytest.raises(RecipeError, match="duplicate key 'base'"):
        read_recipe(path)


@pytest.mark.parametrize("value", ["!!bool maybe", "!!timestamp x", "!!int ''", "!!float ''"])
def test_values_that_their_tags_do_not_fit_are_refused(value: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"base: a\nadapter: {value}\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(path)


def test_a_recipe_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(RecipeError, match="larger than a recipe"):
        read_recipe(path)


def test_a_recipe_that_grows_when_it_is_read(tmp_path: Path) -> None:
    """Aliases that multiply (some more of them would take all memory): what they stand for is not written out."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 6)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(lines) + "\nbase: *a5\nadapter: b\ntarget: nf4\n")
    with pytest.raises(RecipeError) as caught:
        make_recipe(read_recipe(path))
    assert len(str(caught.value)) < 2000
