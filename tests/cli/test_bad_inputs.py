"""Handcrafted bad inputs through the console command: the message, the exit code, and an untouched output folder."""

from __future__ import annotations

import itertools
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from qmerge.errors import (
    AdapterError,
    CheckpointError,
    NumbersError,
    QmergeError,
    RecipeError,
    RoomError,
)

from ..conftest import Cli, Ran, snapshot
from ..models import edit_json

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
Q = "model.layers.0.self_attn.q_proj"
PEFT_Q = f"base_model.model.{Q}"
STATE = f"{Q}.weight.quant_state.bitsandbytes__nf4"


class Place(NamedTuple):
    """Copies that a case may break."""

    base: Path
    adapter: Path
    tmp: Path

    @property
    def out(self) -> Path:
        return self.tmp / "out"


@dataclass(frozen=True)
class Case:
    """``spoil`` breaks a good base or adapter; ``words`` must all stand in the message."""

    name: str
    spoil: Callable[[Place], object]
    error: type[QmergeError]
    words: tuple[str, ...]
    base: str = "dense"
    target: str = "bf16"
    arguments: tuple[str, ...] = ()


# --- tools -----------------------------------------------------------------------------------------------------------


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the data of a safetensors file."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def put(path: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def edit_header(change: Callable[[dict[str, Any]], None], file: str = MODEL) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = (place.adapter if file == ADAPTER else place.base) / file
        header, data = parts_of(path)
        change(header)
        put(path, header, data)

    return spoil


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object], file: str = MODEL) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = (place.adapter if file == ADAPTER else place.base) / file
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})

    return spoil


def edit_adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Place], None]:
    return edit_tensors(change, ADAPTER)


def option(**changes: Any) -> Callable[[Place], None]:
    return lambda place: edit_json(place.adapter / ADAPTER_CONFIG, **changes)


def configure(**changes: Any) -> Callable[[Place], None]:
    return lambda place: edit_json(place.base / "config.json", **changes)


def file_as(file: str, content: bytes | Callable[[bytes], bytes]) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = (place.adapter if file in (ADAPTER, ADAPTER_CONFIG) else place.base) / file
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return spoil


def renamed(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if old in name:
                tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def filled(name: str, value: float, index: tuple[int, ...] = (0, 0)) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][index] = value

    return change


def state_as(**changes: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    """Change the JSON text of a quant state."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        state = {**json.loads(bytes(tensors[STATE].tolist())), **changes}
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return change


def index(change: Callable[[dict[str, str]], object]) -> Callable[[Place], None]:
    """Change the weight_map of a sharded base."""

    def spoil(place: Place) -> None:
        content = json.loads((place.base / INDEX).read_text())
        change(content["weight_map"])
        (place.base / INDEX).write_text(json.dumps(content))

    return spoil


def shards(place: Place) -> list[Path]:
    return sorted(place.base.glob("*.safetensors"))


# --- what is wrong ---------------------------------------------------------------------------------------------------


def first_two(header: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    entries = sorted((e for n, e in header.items() if n != "__metadata__"), key=lambda e: e["data_offsets"][0])
    return next(
        (a, b)
        for a, b in itertools.pairwise(entries)
        if a["data_offsets"][1] - a["data_offsets"][0] == b["data_offsets"][1] - b["data_offsets"][0]
    )


def overlap(header: dict[str, Any]) -> None:
    one, two = first_two(header)
    two["data_offsets"] = one["data_offsets"]


def hole(place: Place) -> None:
    header, data = parts_of(place.base / MODEL)
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + 8 for n in entry["data_offsets"]]
    put(place.base / MODEL, header, bytes(8) + data)


def twice_and_accepted(place: Place) -> None:
    """The safetensors library opens this one: the last of the two entries is right."""
    header, data = parts_of(place.base / MODEL)
    entry = json.dumps({**header[f"{Q}.weight"], "data_offsets": [0, 4], "shape": [2]})
    put(place.base / MODEL, f'{{"{Q}.weight": {entry}, ' + json.dumps(header)[1:], data)
    with safetensors.safe_open(place.base / MODEL, "pt") as opened:
        assert f"{Q}.weight" in opened.keys()  # noqa: SIM118


def twice_and_refused(place: Place) -> None:
    header, data = parts_of(place.base / MODEL)
    entry = json.dumps({**header[f"{Q}.weight"], "data_offsets": [0, 4], "shape": [2]})
    put(place.base / MODEL, json.dumps(header)[:-1] + f', "{Q}.weight": {entry}}}', data)


def set_entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[f"{Q}.weight"].update(changes)


def same_tensor_twice(place: Place) -> None:
    """A later shard also holds a tensor of the first one."""
    one, two = shards(place)[:2]
    name, tensor = next(iter(load_file(one).items()))
    save_file({**load_file(two), name: tensor}, two, metadata={"format": "pt"})


def double_key(file: str, key: str) -> Callable[[Place], None]:
    def change(text: bytes) -> bytes:
        value = json.dumps(json.loads(text)[key]).encode()
        return b'{"' + key.encode() + b'": ' + value + b"," + text.lstrip()[1:]

    return file_as(file, change)


def pickled(folder: str, name: str) -> Callable[[Place], None]:
    def spoil(place: Place) -> None:
        path = getattr(place, folder)
        for file in path.glob("*.safetensors*"):
            file.unlink()
        (path / name).write_bytes(b"\x80\x04cos\nsystem\n.")

    return spoil


def out_holds_something(place: Place) -> None:
    place.out.mkdir()
    (place.out / "mine.txt").write_text("mine")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614\nsize 12345\n"
QUANT = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

HEADERS = [
    Case("truncated", file_as(MODEL, lambda raw: raw[:-10]), CheckpointError, (MODEL, "truncated", "Download")),
    Case("padded", file_as(MODEL, lambda raw: raw + bytes(8)), CheckpointError, (MODEL, "the file at")),
    Case("header_cut", file_as(MODEL, lambda raw: raw[:100]), CheckpointError, (MODEL, "100 bytes", "Download")),
    Case("empty_file", file_as(MODEL, b""), CheckpointError, (MODEL, "0 bytes")),
    Case(
        "length_too_large",
        file_as(MODEL, lambda raw: struct.pack("<Q", 2**40) + raw[8:]),
        CheckpointError,
        (MODEL, str(2**40)),
    ),
    Case(
        "length_too_small",
        file_as(MODEL, lambda raw: struct.pack("<Q", 50) + raw[8:]),
        CheckpointError,
        (MODEL, "not valid JSON"),
    ),
    Case("twice_accepted", twice_and_accepted, CheckpointError, (MODEL, f"{Q}.weight", "duplicate key")),
    Case("twice_refused", twice_and_refused, CheckpointError, (MODEL, f"{Q}.weight", "duplicate key")),
    Case("overlap", edit_header(overlap), CheckpointError, (MODEL, "overlap")),
    Case("hole", hole, CheckpointError, (MODEL, "hole")),
    Case("unknown_dtype", edit_header(set_entry(dtype="F12")), CheckpointError, (f"{Q}.weight", "F12")),
    Case("shape_lies", edit_header(set_entry(shape=[64, 65])), CheckpointError, (f"{Q}.weight", "[64, 65]", "8192")),
    Case("negative_shape", edit_header(set_entry(shape=[-64, -64])), CheckpointError, (f"{Q}.weight", "shape")),
    Case("shape_as_text", edit_header(set_entry(shape="64")), CheckpointError, (f"{Q}.weight", "shape")),
    Case("no_offsets", edit_header(lambda h: h[f"{Q}.weight"].pop("data_offsets")), CheckpointError, (f"{Q}.weight",)),
    Case("bad_metadata", edit_header(lambda h: h.update(__metadata__={"a": 1})), CheckpointError, ("__metadata__",)),
    Case("git_lfs", file_as(MODEL, LFS), CheckpointError, (MODEL, "git-lfs pointer", "git lfs pull")),
    Case("lfs_adapter", file_as(ADAPTER, LFS), AdapterError, (ADAPTER, "git-lfs pointer")),
    Case("cut_adapter", file_as(ADAPTER, lambda raw: raw[:-1]), AdapterError, (ADAPTER, "truncated")),
]

FOLDERS = [
    Case("no_model", lambda p: (p.base / MODEL).unlink(), CheckpointError, (MODEL, INDEX)),
    Case("no_config", lambda p: (p.base / "config.json").unlink(), CheckpointError, ("config.json",)),
    Case("config_is_a_list", file_as("config.json", b"[]"), CheckpointError, ("config.json", "object", "list")),
    Case("config_cut", file_as("config.json", lambda raw: raw[:40]), CheckpointError, ("config.json", "JSON")),
    Case(
        "config_twice",
        double_key("config.json", "model_type"),
        CheckpointError,
        ("config.json", "model_type", "duplicate key"),
    ),
    Case(
        "index_twice",
        double_key(INDEX, "weight_map"),
        CheckpointError,
        (INDEX, "weight_map", "duplicate key"),
        "sharded",
    ),
    Case(
        "missing_shard",
        lambda p: shards(p)[1].unlink(),
        CheckpointError,
        (INDEX, "model-00002", "Download"),
        "sharded",
    ),
    Case(
        "outside",
        index(lambda m: m.update({f"{Q}.weight": "../outside.safetensors"})),
        CheckpointError,
        (INDEX, "../outside.safetensors", "inside"),
        "sharded",
    ),
    Case(
        "absolute",
        index(lambda m: m.update({f"{Q}.weight": "/etc/model.safetensors"})),
        CheckpointError,
        (INDEX, "/etc/model.safetensors", "inside"),
        "sharded",
    ),
    Case(
        "drive",
        index(lambda m: m.update({f"{Q}.weight": "C:model.safetensors"})),
        CheckpointError,
        (INDEX, "C:model.safetensors", "inside"),
        "sharded",
    ),
    Case(
        "backslash",
        index(lambda m: m.update({f"{Q}.weight": "a\\..\\..\\model.safetensors"})),
        CheckpointError,
        (INDEX, "inside"),
        "sharded",
    ),
    Case(
        "not_a_safetensors_file",
        index(lambda m: m.update({f"{Q}.weight": "config.json"})),
        CheckpointError,
        (INDEX, "config.json", ".safetensors"),
        "sharded",
    ),
    Case(
        "weight_map_is_a_list",
        lambda p: edit_json(p.base / INDEX, weight_map=[]),
        CheckpointError,
        ("weight_map",),
        "sharded",
    ),
    Case("in_two_shards", same_tensor_twice, CheckpointError, ("model-00001", "model-00002", "once"), "sharded"),
    Case(
        "index_names_more",
        index(lambda m: m.update({"model.ghost.weight": next(iter(m.values()))})),
        CheckpointError,
        (INDEX, "model.ghost.weight"),
        "sharded",
    ),
    Case(
        "index_names_less",
        index(lambda m: m.pop(f"{Q}.weight")),
        CheckpointError,
        (INDEX, f"{Q}.weight", "does not name"),
        "sharded",
    ),
    Case(
        "index_names_another_shard",
        index(lambda m: m.update({f"{Q}.weight": sorted(set(m.values()) - {m[f"{Q}.weight"]})[0]})),
        CheckpointError,
        (INDEX, f"{Q}.weight"),
        "sharded",
    ),
    Case(
        "pickled_base",
        pickled("base", "pytorch_model.bin"),
        CheckpointError,
        ("pytorch_model.bin", "pickle", "safetensors"),
    ),
    Case("pickled_adapter", pickled("adapter", "adapter_model.bin"), AdapterError, ("adapter_model.bin", "pickle")),
    Case("no_adapter_config", lambda p: (p.adapter / ADAPTER_CONFIG).unlink(), AdapterError, (ADAPTER_CONFIG, "PEFT")),
    Case("no_adapter_tensors", lambda p: (p.adapter / ADAPTER).unlink(), AdapterError, (ADAPTER, "PEFT")),
    Case(
        "adapter_config_twice", double_key(ADAPTER_CONFIG, "r"), AdapterError, (ADAPTER_CONFIG, "'r'", "duplicate key")
    ),
    Case("adapter_config_cut", file_as(ADAPTER_CONFIG, lambda raw: raw[:50]), AdapterError, (ADAPTER_CONFIG, "JSON")),
]

A, B = f"{PEFT_Q}.lora_A.weight", f"{PEFT_Q}.lora_B.weight"
ADAPTERS = [
    Case("nan_in_a", edit_adapter(filled(A, torch.nan)), AdapterError, (f"{Q}.lora_A", "NaN")),
    Case("inf_in_b", edit_adapter(filled(B, torch.inf)), AdapterError, (f"{Q}.lora_B", "infinity")),
    Case("no_a", edit_adapter(lambda t: t.pop(A)), AdapterError, (Q, "no lora_A")),
    Case("no_b", edit_adapter(lambda t: t.pop(B)), AdapterError, (Q, "no lora_B")),
    Case("another_rank", option(r=8), AdapterError, ("down_proj", "rank 8", "[4, 160]")),
    Case("another_rank_by_pattern", option(rank_pattern={"q_proj": 2}), AdapterError, ("q_proj", "rank 2")),
    Case("rank_is_text", option(r="four"), AdapterError, (ADAPTER_CONFIG, "four")),
    Case("no_rank", option(r=None), AdapterError, (ADAPTER_CONFIG, "is not a number")),
    Case("pattern_is_a_list", option(alpha_pattern=["q_proj"]), AdapterError, (ADAPTER_CONFIG, "pattern")),
    Case(
        "rank_zero",
        lambda p: (
            edit_adapter(lambda t: [t.update({n: x[:0] if "lora_A" in n else x[:, :0]}) for n, x in list(t.items())])(p),
            option(r=0)(p),
        ),
        AdapterError,
        ("rank",),
    ),
    Case(
        "wrong_shape",
        edit_adapter(lambda t: t.update({A: torch.zeros(4, 32)})),
        AdapterError,
        (f"{Q}.weight", "[64, 64]", "[64, 32]"),
    ),
    Case(
        "transposed",
        edit_adapter(lambda t: t.update({A.replace("q_proj", "k_proj"): torch.zeros(4, 32), B.replace("q_proj", "k_proj"): torch.zeros(64, 4)})),
        AdapterError,
        ("k_proj.weight", "[32, 64]", "[64, 32]"),
    ),
    Case(
        "three_dimensions",
        edit_adapter(lambda t: t.update({A: torch.zeros(4, 64, 1)})),
        AdapterError,
        (Q, "[4, 64, 1]", "not the factors of one convolution"),
    ),
    Case(
        "another_base",
        edit_adapter(renamed("model.layers", "transformer.h")),
        AdapterError,
        ("28 adapter tensors", "transformer.h.0", "Is this the base"),
    ),
    Case(
        "another_prefix",
        edit_adapter(renamed("base_model.model.model.", "base_model.model.model.language_model.")),
        AdapterError,
        ("language_model.layers.0", "The base has model.layers.0", "prefix"),
    ),
    Case("more_layers", edit_adapter(renamed("layers.1.", "layers.7.")), AdapterError, ("14 adapter tensors", "layers.7.")),
    Case("no_prefix", edit_adapter(renamed("base_model.model.", "")), AdapterError, ("base_model.model.", "PEFT")),
    Case("empty", edit_adapter(lambda t: t.clear()), AdapterError, (ADAPTER, "empty")),
    Case("unknown_tensor", edit_adapter(lambda t: t.update({f"{PEFT_Q}.lora_C.weight": torch.zeros(2)})), AdapterError, (f"{Q}.lora_C",)),
    Case(
        "dora_tensor",
        edit_adapter(lambda t: t.update({f"{PEFT_Q}.lora_magnitude_vector": torch.ones(64)})),
        AdapterError,
        (f"{Q} has a lora_magnitude_vector", "does not say use_dora"),
    ),
    Case(
        "embedding_tensor",
        edit_adapter(lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 96)})),
        AdapterError,
        ("embed_tokens has lora_embedding_A but no lora_embedding_B",),
    ),
    Case("lora_bias_tensor", edit_adapter(lambda t: t.update({f"{PEFT_Q}.lora_B.bias": torch.ones(64)})), AdapterError, ("lora_B.bias",)),
    Case(
        "two_adapters_in_a_file",
        edit_adapter(lambda t: t.update({f"{PEFT_Q}.lora_A.other.weight": torch.ones(4, 64)})),
        AdapterError,
        ("contains the adapters: default, other", "#default", "#other"),
    ),
    Case("integers", edit_adapter(lambda t: t.update({A: torch.ones(4, 64, dtype=torch.int64)})), AdapterError, (f"{Q}.lora_A", "float")),
    Case("peft_type", option(peft_type="LOHA"), AdapterError, ("LOHA", "LORA")),
    Case("no_peft_type", option(peft_type=None), AdapterError, ("peft_type",)),
]  # fmt: skip

REFUSED: dict[str, Any] = {
    "use_dora": True, "use_bdlora": True, "qalora_group_size": 0, "lora_bias": True, "bias": "some",
    "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 2], "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 3]], "arrow_config": {"a": 1}, "alora_invocation_tokens": [5], "megatron_config": {"a": 1},
    "loftq_config": {"bits": 4}, "nvfp4_merge_aware": True,
}  # fmt: skip
INITS = ("pissa_niter_16", "loftq", "corda", "lora_ga", "something_new")
OPTIONS = [
    *(Case(f"option_{name}", option(use_qalora=name == "qalora_group_size", **{name: value}), AdapterError, (name, ADAPTER_CONFIG)) for name, value in REFUSED.items()),
    *(Case(f"init_{name}", option(init_lora_weights=name), AdapterError, ("init_lora_weights", name)) for name in INITS),
]  # fmt: skip

W = f"{Q}.weight"
QUANTIZED = [
    Case("exl2", configure(quantization_config={"quant_method": "exl2", "bits": 4}), CheckpointError, ("exl2", "bitsandbytes")),
    Case("quip", configure(quantization_config={"quant_method": "quip"}), CheckpointError, ("quip", "bitsandbytes")),
    Case("no_method", configure(quantization_config={"bits": 4}), CheckpointError, ("quantiz",)),
    Case("says_nf4_is_dense", configure(quantization_config=QUANT), CheckpointError, ("config.json", "no tensor is")),
    Case("nf4_says_dense", configure(quantization_config=None), CheckpointError, ("nf4", "config.json"), "nf4"),
    Case("no_absmax", edit_tensors(lambda t: t.pop(f"{W}.absmax")), CheckpointError, (f"{W}.absmax", "missing"), "nf4"),
    Case("no_codes", edit_tensors(lambda t: t.pop(W)), CheckpointError, (W, "missing"), "nf4"),
    Case("short_absmax", edit_tensors(lambda t: t.update({f"{W}.absmax": torch.ones(63)})), CheckpointError, (W, "64 absmax", "63"), "nf4"),
    Case("short_codes", edit_tensors(lambda t: t.update({W: t[W][:-2]})), CheckpointError, (W, "2048", "2046"), "nf4"),
    Case("absmax_dtype", edit_tensors(lambda t: t.update({f"{W}.absmax": t[f"{W}.absmax"].half()})), CheckpointError, (W, "F16", "F32"), "nf4"),
    Case("absmax_nan", edit_tensors(filled(f"{W}.absmax", torch.nan, (0,))), CheckpointError, (f"{W}.absmax", "NaN"), "nf4"),
    Case("no_state", edit_tensors(lambda t: t.pop(STATE)), CheckpointError, (Q, "missing"), "nf4"),
    Case("no_state_no_absmax", edit_tensors(lambda t: [t.pop(n) for n in list(t) if n.startswith(f"{W}.")]), CheckpointError, (W, "missing"), "nf4"),
    Case("state_no_json", edit_tensors(lambda t: t.update({STATE: torch.full((20,), 123, dtype=torch.uint8)})), CheckpointError, (STATE,), "nf4"),
    Case("state_no_text", edit_tensors(lambda t: t.update({STATE: torch.full((20,), 255, dtype=torch.uint8)})), CheckpointError, (STATE,), "nf4"),
    Case("state_is_a_list", edit_tensors(lambda t: t.update({STATE: torch.tensor(list(b"[1]"), dtype=torch.uint8)})), CheckpointError, (STATE,), "nf4"),
    Case("state_block_text", edit_tensors(state_as(blocksize="many")), CheckpointError, (Q, "many"), "nf4"),
    Case("state_block_zero", edit_tensors(state_as(blocksize=0)), CheckpointError, (W, "blocks of 0"), "nf4"),
    Case("state_block_48", edit_tensors(state_as(blocksize=48)), CheckpointError, (W, "blocks of 48"), "nf4"),
    Case("state_shape_text", edit_tensors(state_as(shape="6464")), CheckpointError, (W,), "nf4"),
    Case("state_shape_words", edit_tensors(state_as(shape=["a", "b"])), CheckpointError, (Q,), "nf4"),
    Case("state_shape_lies", edit_tensors(state_as(shape=[64, 65])), CheckpointError, (W, "[64, 65]"), "nf4"),
    Case("state_shape_swapped", edit_tensors(state_as(shape=[32, 128])), AdapterError, (W, "[32, 128]", "[64, 64]"), "nf4"),
    Case("state_other_type", edit_tensors(state_as(quant_type="fp4")), CheckpointError, (Q, "fp4"), "nf4"),
    Case("nested_absmax_gone", edit_tensors(lambda t: t.pop(f"{W}.nested_absmax")), CheckpointError, (f"{W}.nested_absmax", "missing"), "nf4_dq"),
    Case("nested_map_gone", edit_tensors(lambda t: t.pop(f"{W}.nested_quant_map")), CheckpointError, (f"{W}.nested_quant_map", "missing"), "nf4_dq"),
    Case("nested_offset_text", edit_tensors(state_as(nested_offset="much")), CheckpointError, (Q, "much"), "nf4_dq"),
    Case("scb_shape", edit_tensors(lambda t: t.update({f"{Q}.SCB": torch.ones(63)})), CheckpointError, (f"{Q}.SCB", "[63]", "[64]"), "int8"),
    Case("scb_gone", edit_tensors(lambda t: t.pop(f"{Q}.SCB")), CheckpointError, (Q, "missing"), "int8"),
    Case("scb_nan", edit_tensors(filled(f"{Q}.SCB", torch.nan, (0,))), CheckpointError, (f"{Q}.SCB", "NaN"), "int8"),
    Case("int8_codes_gone", edit_tensors(lambda t: t.pop(W)), CheckpointError, (Q, "SCB", "nothing"), "int8"),
    Case("int8_layout", edit_tensors(lambda t: t.update({f"{Q}.weight_format": torch.tensor(2, dtype=torch.uint8)})), CheckpointError, (f"{Q}.weight_format", "row-major"), "int8"),
]  # fmt: skip

# The kernel that undoes double quantization reads where it is told to: these must not even reach it, and are tried in a
# process of their own.
CRASHES = [
    Case("nested_map_short", edit_tensors(lambda t: t.update({f"{W}.nested_quant_map": torch.ones(3)})), CheckpointError, (W, "nested_quant_map"), "nf4_dq"),
    Case("nested_absmax_short", edit_tensors(lambda t: t.update({f"{W}.nested_absmax": torch.ones(0)})), CheckpointError, (W, "nested_absmax"), "nf4_dq"),
    Case("nested_block_zero", edit_tensors(state_as(nested_blocksize=0)), CheckpointError, (Q, "nested_blocksize"), "nf4_dq"),
]  # fmt: skip

NUMBERS = [
    Case("nan_in_base", edit_tensors(filled("model.layers.1.mlp.down_proj.weight", torch.nan)), NumbersError, ("model.layers.1.mlp.down_proj.weight", "NaN")),
    Case("inf_in_base", edit_tensors(filled("model.layers.1.mlp.down_proj.weight", torch.inf)), NumbersError, ("model.layers.1.mlp.down_proj.weight", "infinity")),
    Case("inf_copied", edit_tensors(filled("model.norm.weight", torch.inf, (3,))), NumbersError, ("model.norm.weight", "infinity"), target="nf4"),
    Case("nan_copied", edit_tensors(filled("lm_head.weight", torch.nan)), NumbersError, ("lm_head.weight", "NaN")),
    Case("inf_converted", edit_tensors(filled("lm_head.weight", -torch.inf)), NumbersError, ("lm_head.weight", "infinity"), target="fp32"),
    Case("square_past_float32", edit_tensors(filled(f"{Q}.weight", 3e38)), NumbersError, (f"{Q}.weight", "3e+38"), target="int8"),
    Case("past_any_weight", edit_tensors(filled(f"{Q}.weight", 1e30)), NumbersError, (f"{Q}.weight", "1e+30", "alpha"), target="nf4"),
    Case("past_fp16_merged", edit_tensors(filled("model.layers.1.mlp.down_proj.weight", 70000.0)), NumbersError, ("model.layers.1.mlp.down_proj.weight", "65504", "bf16"), target="fp16"),
    Case("past_fp16_converted", edit_tensors(filled("model.norm.weight", -70000.0, (3,))), NumbersError, ("model.norm.weight", "65504", "70"), target="fp16"),
]  # fmt: skip

ROOM = [Case("memory", lambda p: None, RoomError, ("--max-memory", "MB"), "nf4", "nf4", ("--max-memory", "100kB"))]

COMMANDS = [
    Case("unknown_target", lambda p: None, RecipeError, ("'nf5'", "Did you mean 'nf4'", "qmerge formats"), target="nf5"),
    Case("raw_is_no_target", lambda p: None, RecipeError, ("'raw'", "qmerge formats"), target="raw"),
    Case("unknown_rounding", lambda p: None, RecipeError, ("'nearst'", "Did you mean 'nearest'"), arguments=("--rounding", "nearst")),
    Case("unknown_device", lambda p: None, RecipeError, ("device", "tpu"), arguments=("--device", "tpu")),
    Case("size", lambda p: None, RecipeError, ("5 bananas", "GB"), arguments=("--max-shard-size", "5 bananas")),
    Case("second_adapter", lambda p: None, AdapterError, ("another", "no such folder"), arguments=("--adapter", "another")),
    Case("combination", lambda p: None, RecipeError, ("'tiez'", "Did you mean 'ties'"), arguments=("--combine", "tiez")),
    Case("density_of_one", lambda p: None, RecipeError, ("density", "several adapters"), arguments=("--density", "0.5")),
    Case("revision_of_a_folder", lambda p: None, CheckpointError, ("is local", "main"), arguments=("--revision", "main")),
    Case("adapter_revision_of_a_folder", lambda p: None, AdapterError, ("is local", "main"), arguments=("--adapter-revision", "main")),
    Case("no_such_folder", lambda p: None, CheckpointError, ("no such folder", "owner/name"), arguments=("--base", "./no/such/folder")),
    Case("no_such_adapter", lambda p: None, AdapterError, ("no such folder", "owner/name"), arguments=("--adapter", "./no/such/folder")),
    Case("block_size_of_bf16", lambda p: None, RecipeError, ("--block-size", "bf16"), arguments=("--block-size", "64")),
    Case("block_size", lambda p: None, RecipeError, ("48", "64"), "nf4", "nf4", ("--block-size", "48")),
    Case("storage", lambda p: None, RecipeError, ("uint7", "uint8"), "nf4", "nf4", ("--quant-storage", "uint7")),
    Case("trained_on_a_quantized_base", lambda p: None, RecipeError, ("--trained-on",), "nf4", "nf4", ("--trained-on", "nf4")),
    Case("onto_which_original", lambda p: None, RecipeError, ("--original",), "nf4", "nf4", ("--merge-onto", "original")),
    Case("original_for_nothing", lambda p: None, RecipeError, ("merge_onto",), "nf4", "nf4", ("--original", "x/y")),
]  # fmt: skip

CASES = [*HEADERS, *FOLDERS, *ADAPTERS, *OPTIONS, *QUANTIZED, *NUMBERS, *ROOM, *COMMANDS]


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path, lora: Path) -> Place:
    """Copies of a good base and adapter."""
    kind = getattr(request, "param", "dense")
    base = shutil.copytree(request.getfixturevalue(kind), tmp_path / "base")
    return Place(base, shutil.copytree(lora, tmp_path / "adapter"), tmp_path)


def merge(cli: Cli, place: Place, target: str = "bf16", *more: object, out: object = None) -> Ran:
    """Later options win, as on any command line; --adapter is the one that adds up."""
    adapter = [] if "--adapter" in more and "another" not in more else ["--adapter", place.adapter]
    plain = ("--target", target, "--out", out or place.out, "--device", "cpu", "--rounding", "nearest")
    return cli("--base", place.base, *adapter, *plain, *more)


def check(ran: Ran, error: type[QmergeError], words: tuple[str, ...]) -> None:
    """One line that begins with ``qmerge:``, nothing on stdout, the error's own exit code."""
    lines = [line for line in ran.err.splitlines() if not line.startswith("warning: ")]
    assert ran.code == error.exit_code, ran.err
    assert type(ran.error) is error, ran.error
    assert len(lines) == 1 and lines[0].startswith("qmerge: "), ran.err
    assert ran.out == ""
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


@pytest.mark.parametrize(
    ("case", "place"),
    [pytest.param(case, case.base, id=case.name) for case in CASES],
    indirect=["place"],
)
def test_bad_input_is_refused_and_nothing_is_written(case: Case, place: Place, cli: Cli) -> None:
    case.spoil(place)
    inputs = snapshot(place.tmp)
    ran = merge(cli, place, case.target, *case.arguments)
    check(ran, case.error, case.words)
    assert not place.out.exists(), snapshot(place.out)
    assert snapshot(place.tmp) == inputs


@pytest.mark.slow
@pytest.mark.parametrize(("case", "place"), [pytest.param(c, c.base, id=c.name) for c in CRASHES], indirect=["place"])
def test_bad_input_does_not_crash_the_process(case: Case, place: Place) -> None:
    case.spoil(place)
    command = [sys.executable, "-m", "qmerge", "--base", place.base, "--adapter", place.adapter, "--target", "bf16"]
    done = subprocess.run([*map(str, command), "--out", str(place.out)], capture_output=True, text=True)
    assert done.returncode == case.error.exit_code, (done.returncode, done.stderr[-500:])
    assert not [word for word in case.words if word not in done.stderr], done.stderr
    assert not place.out.exists()


def test_names_of_cases_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_good_input_is_merged(place: Place, cli: Cli) -> None:
    """The control: what the cases break works when it is not broken."""
    ran = merge(cli, place)
    assert ran.code == 0, ran.err
    assert (place.out / MODEL).exists() and (place.out / "config.json").exists()


# --- the output folder -----------------------------------------------------------------------------------------------


def test_out_holds_something(place: Place, cli: Cli) -> None:
    out_holds_something(place)
    check(merge(cli, place), RecipeError, ("--out", "not empty", "mine.txt"))
    assert snapshot(place.out).keys() == {"mine.txt"}


def test_out_is_a_file(place: Place, cli: Cli) -> None:
    place.out.write_text("mine")
    check(merge(cli, place), RecipeError, ("--out", "is a file"))
    assert place.out.read_text() == "mine"


@pytest.mark.parametrize(("inside", "role"), [("base", "the base"), ("adapter", "the adapter")])
@pytest.mark.parametrize("below", ["", "deep/out"])
def test_out_inside_an_input(place: Place, cli: Cli, inside: str, role: str, below: str) -> None:
    before = snapshot(place.tmp)
    check(merge(cli, place, out=place.tmp / inside / below), RecipeError, ("--out", f"inside {role}"))
    assert snapshot(place.tmp) == before and not (place.tmp / inside / "deep").exists()


def test_out_inside_the_base_through_a_link(place: Place, cli: Cli) -> None:
    (place.tmp / "link").symlink_to(place.base, target_is_directory=True)
    check(merge(cli, place, out=place.tmp / "link" / "out"), RecipeError, ("--out", "inside the base"))
    assert not (place.base / "out").exists()


def test_out_inside_the_hub_cache(place: Place, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place.tmp / "hub"))
    check(merge(cli, place, out=place.tmp / "hub" / "out"), RecipeError, ("--out", "the Hub cache"))
    assert not (place.tmp / "hub").exists()


def test_out_below_a_file(place: Place, cli: Cli) -> None:
    (place.tmp / "file").write_text("mine")
    check(merge(cli, place, out=place.tmp / "file" / "out"), RecipeError, ("--out", "file"))


def test_no_room(place: Place, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: object) -> Any:
        return shutil._ntuple_diskusage(10**12, 10**12, 12_000_000)  # type: ignore[attr-defined]

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check(merge(cli, place), RoomError, ("--out", "needs", "0.01 GB free"))
    assert not place.out.exists()


@pytest.mark.parametrize("place", ["sharded"], indirect=True)
def test_what_was_written_before_bad_numbers_goes(place: Place, cli: Cli) -> None:
    """The last shard is the bad one: shards before it have their names already, and must go."""
    last = shards(place)[-1]
    tensors = load_file(last)
    name = next(name for name in tensors if "proj" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, last, metadata={"format": "pt"})
    check(merge(cli, place, "fp16", "--max-shard-size", "60kB"), NumbersError, (name, "NaN"))
    assert not place.out.exists(), snapshot(place.out)


def test_bad_numbers_leave_an_empty_folder_empty(place: Place, cli: Cli) -> None:
    """A folder that was there before stays, empty as it was."""
    place.out.mkdir()
    edit_tensors(filled("model.norm.weight", 70000.0, (0,)))(place)
    check(merge(cli, place, "fp16"), NumbersError, ("model.norm.weight",))
    assert place.out.is_dir() and not list(place.out.iterdir())


@pytest.mark.parametrize("value", [65504.0, -65504.0, 60000.0])
def test_fp16_takes_what_fits(place: Place, cli: Cli, value: float) -> None:
    """The control of the overflow: the largest float16 is no error (bfloat16 rounds 65504 to 65536, so float32)."""
    configure(dtype="float32")(place)
    edit_tensors(lambda t: t.update({n: x.float() for n, x in t.items()}))(place)
    edit_tensors(filled("model.norm.weight", value, (0,)))(place)
    assert merge(cli, place, "fp16").code == 0
    assert load_file(place.out / MODEL)["model.norm.weight"][0].item() == value


def test_a_licence_page_that_is_no_yaml_does_not_stop_the_merge(place: Place, cli: Cli) -> None:
    """The base's README is only asked for its licence; what people write there must not cost them a finished merge."""
    (place.base / "README.md").write_text("---\nlicense: [mit\n  : ]: {\n---\n# A model\n")
    assert merge(cli, place).code == 0
    assert (place.out / "README.md").exists()


# --- the recipe file and the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: a\nadapter: b\ntaget: nf4\n", ("'taget'", "Did you mean 'target'")),
        ("base: [\n", ("recipe.yaml", "not valid YAML")),
        ("- base\n- adapter\n", ("recipe.yaml", "target: nf4")),
        ("", ("recipe.yaml", "target: nf4")),
        ("1: 2\n", ("recipe.yaml", "target: nf4")),
        ("base: a\nadapter: b\ntarget: nf4\nworkers: many\n", ("workers", "many")),
        ("base: a\nadapter: b\ntarget: nf4\nseed: -1\n", ("seed", "-1")),
        ("base: a\nadapter: b\ntarget: nf4\nmerge_onto: orginal\n", ("merge_onto", "orginal", "original")),
        ("base: b\ntarget: nf4\n", ("adapter is needed", "--adapter")),
        ("base: a\nadapter: b\ntarget: nf4\n", ("--out",)),
        ("base: a\nbase: c\nadapter: b\ntarget: nf4\nout: d\n", ("duplicate key 'base'",)),
        ("base: !!python/object/apply:os.system ['true']\n", ("recipe.yaml", "not valid YAML")),
    ],
)
def test_bad_recipe(
    text: str, words: tuple[str, ...], tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    ran = cli("run", "recipe.yaml")
    assert ran.code == 2, ran.err
    assert len(ran.err.splitlines()) == 1 and ran.err.startswith("qmerge: "), ran.err
    assert not [word for word in words if word not in ran.err], ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_recipe_that_is_not_there(cli: Cli, tmp_path: Path) -> None:
    check(cli("run", tmp_path / "none.yaml"), RecipeError, ("none.yaml", "No such file"))


def test_recipe_that_is_no_text(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00base")
    check(cli("run", tmp_path / "recipe.yaml"), RecipeError, ("recipe.yaml", "YAML"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--base", "a"), ("adapter is needed", "--adapter")),
        (("--base", "a", "--target", "nf4", "--out", "o"), ("adapter is needed", "--adapter")),
        (("--base", "a", "--adapter", "b", "--out", "o"), ("target is needed", "--target", "nf4")),
    ],
)
def test_missing_options(arguments: tuple[str, ...], words: tuple[str, ...], cli: Cli) -> None:
    check(cli(*arguments), RecipeError, words)


def test_no_out(place: Place, cli: Cli) -> None:
    check(cli("--base", place.base, "--adapter", place.adapter, "--target", "nf4"), RecipeError, ("--out",))


def test_measure_checks_every_target(place: Place, cli: Cli) -> None:
    """Not only the first of them, and before any work."""
    for bad in ("nf5", "raw"):
        ran = cli("measure", "--base", place.base, "--adapter", place.adapter, "--target", "bf16", "--target", bad)
        check(ran, RecipeError, (repr(bad), "qmerge formats"))


def test_control_characters_of_a_file_do_not_reach_the_terminal(place: Place, cli: Cli) -> None:
    """Names come from files; an escape sequence in one of them must not be obeyed by a terminal."""
    edit_adapter(lambda t: t.update({"base_model.model.\x1b[2J\x1b]0;owned\x07evil.lora_Z": torch.ones(2)}))(place)
    ran = merge(cli, place)
    assert ran.code == 3 and "evil" in ran.err
    assert all(c.isprintable() or c == "\n" for c in ran.err)
    assert len(ran.err.splitlines()) == 1


def test_a_lone_surrogate_in_a_name(place: Place, cli: Cli) -> None:
    """Valid JSON, but no Unicode text: it could not be written again."""

    def change(header: dict[str, Any]) -> None:
        header["\ud800"] = header.pop("model.norm.weight")

    edit_header(change)(place)
    ran = merge(cli, place)
    assert ran.code == 3, ran.err
    assert not place.out.exists()
