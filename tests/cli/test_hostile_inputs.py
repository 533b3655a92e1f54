"""Inputs that are made to crash a reader, or to take all of a machine: one clear line, in bounded time and memory."""

from __future__ import annotations

import json
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qmerge.adapters.reading.patterns import first_matching
from qmerge.checkpoint.documents import DEEPEST, is_deeper
from qmerge.errors import AdapterError, CheckpointError, RecipeError

from ..conftest import Cli
from .test_bad_inputs import (
    ADAPTER_CONFIG,
    MODEL,
    Case,
    Place,
    check,
    configure,
    edit_header,
    file_as,
    merge,
    option,
    place,
    set_entry,
)

__all__ = ["place"]

SECONDS = 5.0
"""Longest time for one refusal; a merge of the same small model takes as long."""

SLOW = "(.|..)*(?!.*)x*"
"""A pattern that takes exponentially long."""

HUGE = 10**30
DEEP = '{"a":' * 3000 + "1" + "}" * 3000


def text_entry(key: str, text: str) -> Callable[[Place], None]:
    """A value in config.json that is written as it is."""
    return file_as("config.json", lambda raw: raw.rstrip()[:-1] + f',"{key}":{text}}}'.encode())


def rank_of_digits(count: int) -> Callable[[bytes], bytes]:
    return lambda raw: raw.replace(b'"r": 4', b'"r": 1' + b"0" * count)


def many_keys(raw: bytes) -> bytes:
    keys = ",".join(f'"k{number}":0' for number in range(40_000))
    return f'{{{keys},"k5":0}}'.encode()


CASES = [
    Case("axes", edit_header(set_entry(shape=[1] * 80_000)), CheckpointError, (MODEL, "shape")),
    Case("shape_overflows", edit_header(set_entry(shape=[10**18] * 300)), CheckpointError, (MODEL, "shape")),
    Case("shape_is_a_dict", edit_header(set_entry(shape={})), CheckpointError, (MODEL, "shape")),
    Case("shape_is_empty_text", edit_header(set_entry(shape="")), CheckpointError, (MODEL, "shape")),
    Case("dtype_is_a_list", edit_header(set_entry(dtype=["F32"])), CheckpointError, (MODEL, "dtype")),
    Case("dtype_is_a_dict", edit_header(set_entry(dtype={})), CheckpointError, (MODEL, "dtype")),
    Case("many_keys", file_as("config.json", many_keys), CheckpointError, ("config.json", "duplicate key")),
    Case("deep_config", text_entry("x", DEEP), CheckpointError, ("config.json",)),
    Case("nested_config", text_entry("x", "[" * 60 + "]" * 60), CheckpointError, ("config.json", str(DEEPEST))),
    Case("quantization_is_text", configure(quantization_config="nf4"), CheckpointError, ("quantization_config", "nf4")),
    Case("method_is_a_list", configure(quantization_config={"quant_method": ["x"]}), CheckpointError, ("quant_method",)),
    Case("skip_list_is_text", configure(quantization_config={"llm_int8_skip_modules": "lm_head"}), CheckpointError, ("skip",)),
    Case("compute_dtype", configure(quantization_config={"bnb_4bit_compute_dtype": 7}), CheckpointError, ("compute_dtype",)),
    Case("group_size_is_text", configure(quantization_config={"group_size": "128"}), CheckpointError, ("group_size",)),
    Case("architectures_is_text", configure(architectures="Llama"), CheckpointError, ("architectures", "Llama")),
    Case("architectures_of_numbers", configure(architectures=[7]), CheckpointError, ("architectures",)),
    Case("model_type_is_a_list", configure(model_type=["llama"]), CheckpointError, ("model_type",)),
    Case("surrogate", configure(model_type="\ud800"), CheckpointError, ("config.json", "surrogate")),
    Case("nul", configure(model_type="\0"), CheckpointError, ("model_type", "NUL")),
    Case("surrogate_elsewhere", configure(x=["a\ud800"]), CheckpointError, ("config.json", "surrogate")),
    Case("vocabulary", configure(vocab_size=HUGE), CheckpointError, ("vocab_size",)),
    Case("layers", configure(num_hidden_layers=10**9), CheckpointError, ("num_hidden_layers", "10000")),
    Case("hidden_size", configure(hidden_size=2**40), CheckpointError, ("hidden_size",)),
    Case("rank_is_infinite", option(r=float("inf")), AdapterError, (ADAPTER_CONFIG,)),
    Case("rank_has_4000_digits", file_as(ADAPTER_CONFIG, rank_of_digits(4000)), AdapterError, ("rank",)),
    Case("rank_has_5000_digits", file_as(ADAPTER_CONFIG, rank_of_digits(5000)), AdapterError, (ADAPTER_CONFIG,)),
    Case("alpha_is_a_list", option(lora_alpha=[8]), AdapterError, (ADAPTER_CONFIG,)),
    Case("alpha_is_nan", option(lora_alpha=float("nan")), AdapterError, ("alpha",)),
    Case("saved_is_a_number", option(modules_to_save=5), AdapterError, ("modules_to_save", "5")),
    Case("parameters_of_numbers", option(target_parameters=[5]), AdapterError, ("target_parameters",)),
    Case("targets_of_numbers", option(target_modules=[5]), AdapterError, ("target_modules",)),
    Case("version_of_5000_digits", option(peft_version="9" * 5000), AdapterError, ("peft_version", "100")),
    Case("long_base_name", option(base_model_name_or_path="x" * 10_000), AdapterError, ("base_model_name_or_path",)),
    Case("base_name_with_nul", option(base_model_name_or_path="a\0b"), AdapterError, ("base_model_name_or_path", "NUL")),
    Case("slow_pattern", option(rank_pattern={SLOW: 8}), AdapterError, (SLOW, "takes more than")),
    Case("slow_targets", option(target_modules=SLOW), AdapterError, (SLOW,)),
    Case("bad_pattern", option(rank_pattern={"(q_proj": 8}), AdapterError, ("(q_proj", "not valid")),
    Case("replication", option(layer_replication=[[0, 10**9]]), AdapterError, ("layer_replication",)),
    Case("many_replications", option(layer_replication=[[0, 2]] * 100_000), AdapterError, ("layer_replication",)),
    Case("replication_is_text", option(layer_replication="02"), AdapterError, ("layer_replication",)),
    Case("type_is_a_list", option(peft_type=["LORA"]), AdapterError, ("peft_type",)),
]  # fmt: skip


def within_bounds(run: Callable[[], Any]) -> Any:
    """The result, after a check that it took neither long nor much memory."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    result = run()
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime - before.ru_utime < SECONDS
    assert after.ru_maxrss - before.ru_maxrss < 300_000, "kB"
    return result


@pytest.mark.parametrize(("case", "place"), [pytest.param(c, c.base, id=c.name) for c in CASES], indirect=["place"])
def test_one_line_and_nothing_written(case: Case, place: Place, cli: Cli) -> None:
    case.spoil(place)
    ran = within_bounds(lambda: merge(cli, place, case.target, *case.arguments))
    check(ran, case.error, case.words)
    assert not place.out.exists()


@pytest.mark.parametrize("file", [MODEL, "config.json", ADAPTER_CONFIG, "adapter_model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_no_regular_file(place: Place, cli: Cli, file: str, kind: str) -> None:
    """A pipe would be waited for; /dev/zero never ends."""
    folder = place.adapter if file.startswith("adapter") else place.base
    (folder / file).unlink()
    if kind == "pipe":
        os.mkfifo(folder / file)
    else:
        (folder / file).symlink_to("/dev/zero")
    ran = merge(cli, place)
    check(ran, AdapterError if file.startswith("adapter") else CheckpointError, (file, "regular file"))


RECIPES = {
    "aliases": ("a: &a [x,x]\nb: &b [*a,*a]\nbase: x\n", "aliases"),
    "date": ("base: x\nseed: 2001-99-99\n", "YAML"),
    "number": ("base: x\nseed: !!int abc\n", "YAML"),
    "digits": (f"base: x\nseed: {'9' * 5000}\n", "YAML"),
    "nesting": ("base: " + "[" * 5000 + "\n", "YAML"),
    "no adapter": ("base: x\nadapter: []\ntarget: nf4\nout: y\n", "adapter"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(tmp_path: Path, cli: Cli, name: str) -> None:
    text, word = RECIPES[name]
    (tmp_path / "recipe.yaml").write_text(text)
    check(within_bounds(lambda: cli("run", tmp_path / "recipe.yaml")), RecipeError, (word,))


def test_recipe_in_a_pipe(tmp_path: Path, cli: Cli) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    check(cli("run", tmp_path / "recipe.yaml"), RecipeError, ("recipe.yaml", "regular"))


def test_depth_is_counted_level_by_level() -> None:
    value: Any = 1
    for _ in range(DEEPEST):
        value = [value]
    assert not is_deeper(value, DEEPEST) and is_deeper([value], DEEPEST)
    assert not is_deeper(json.loads("[" + "[]," * 1000 + "[]]"), 2), "wide is not deep"


def test_the_time_limit_is_one_of_each_pattern() -> None:
    """It holds in threads, too, where no signal could end the match."""
    raised: list[Exception] = []

    def match() -> None:
        try:
            first_matching([SLOW], "model.layers.0.self_attn.q_proj")
        except AdapterError as error:
            raised.append(error)

    started = time.monotonic()
    thread = threading.Thread(target=match)
    thread.start()
    thread.join()
    assert raised and time.monotonic() - started < SECONDS


@pytest.mark.parametrize(
    "pattern", ["q_proj", r"layers\.0\.self_attn\.q_proj", r".*\.q_proj", "proj", r"(q|v)_proj", r"[qk]_proj|up"]
)
def test_patterns_match_as_in_peft(pattern: str) -> None:
    from peft.utils.other import get_pattern_key

    for module in (
        "model.layers.0.self_attn.q_proj",
        "q_proj",
        "model.layers.10.self_attn.k_proj",
        "up_proj",
        "xq_proj",
    ):
        expected = get_pattern_key([pattern, "none"], module)
        assert first_matching([pattern, "none"], module) == (None if expected == module != pattern else expected)
