"""Whole merges against the stock libraries: peft's arithmetic, bitsandbytes' quantizer, transformers' loader and files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from qmerge.errors import AdapterError, CheckpointError
from qmerge.formats._bnb4bit_find import Bnb4bitOptions
from qmerge.planning import plan as plan_module

from .. import models
from ..models import edit_json
from . import bnb as parity
from . import stock
from .conftest import Made

Result = Callable[[str, str], Path]

BASES = list(stock.BASES)
QUANTIZED = [kind for kind in BASES if kind != "bf16"]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TARGETS = ["nf4", "fp4", "int8", *DTYPES]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
DEPTH = 15
"""Matrices that a token passes through: seven linear layers, twice, and the head."""


def exact_merge(base: Path, adapter: Path, dense: torch.nn.Module | None = None) -> dict[str, Tensor]:
    """float32: what the stock libraries read in the base, plus what peft adds."""
    values, deltas = stock.values(base), stock.deltas(dense or models.llama(torch.float32), adapter)
    assert deltas and deltas.keys() <= values.keys()
    return {name: value + deltas[name] if name in deltas else value for name, value in values.items()}


def target_of(kind: str) -> str:
    return kind.removesuffix("-dq")


# --- float32 arithmetic ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("scaling", ["lora", "rslora", "patterns", "rslora patterns"])
def test_fp32_is_base_plus_delta(base: Made, adapter: Made, tmp_path: Path, kind: str, scaling: str) -> None:
    out = stock.merged(tmp_path / "out", base(kind), adapter(scaling), "fp32")
    assert stock.differing(stock.tensors(out), exact_merge(base(kind), adapter(scaling))) == []


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("stored", DTYPES)
def test_dense_equals_peft_rounded_once(adapter: Made, tmp_path: Path, stored: str, target: str) -> None:
    """peft merges the float32 model; one cast follows."""
    lora = adapter("patterns")  # scales that are no powers of two
    base = models.save(models.llama(DTYPES[stored]), tmp_path / "base")
    wrapped = stock.adapted(stock.float_model(base), lora).merge_and_unload()
    expected = {name: value.to(DTYPES[target]) for name, value in wrapped.state_dict().items()}
    out = stock.merged(tmp_path / "out", base, lora, target)
    assert stock.differing(stock.tensors(out), expected) == []


def test_peft_rounds_twice_on_a_bf16_base(dense: Path, result: Result, lora: Path) -> None:
    """peft casts the delta to bfloat16, adds, and rounds again. Where that differs from qmerge, qmerge is nearer."""
    peft = PeftModel.from_pretrained(models.llama(torch.bfloat16), lora).merge_and_unload(safe_merge=True).state_dict()
    ours, base = stock.tensors(result("bf16", "bf16")), stock.values(dense)
    wrong = total = 0
    for name, delta in stock.deltas(models.llama(torch.float32), lora).items():
        exact = base[name].double() + delta.double()
        our_error, peft_error = (ours[name].double() - exact).abs(), (peft[name].double() - exact).abs()
        assert bool((our_error <= peft_error).all())
        different = ours[name] != peft[name]
        # A tie in bfloat16 goes to even; apart from ties the nearer one is the only nearest.
        assert bool((our_error[different] < peft_error[different]).all())
        wrong, total = wrong + int(different.sum()), total + different.numel()
    assert 0.005 < wrong / total < 0.3


def by_rows(count: int, base: Path, adapter: Path, target: str, out: Path, patch: pytest.MonkeyPatch) -> Path:
    """A merge that works on about so many rows of a weight at a time."""
    with patch.context() as patched:
        patched.setattr(plan_module, "block_entries", lambda steps, max_memory, workers: 64 * count)
        return stock.merged(out, base, adapter, target)


@pytest.mark.parametrize("kind", ["nf4-dq", "int8", "bf16"])
@pytest.mark.parametrize("target", ["nf4", "int8", "fp32"])
def test_row_blocks_change_no_byte(
    base: Made, few: Path, result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, target: str
) -> None:
    """Large weights are worked on some rows at a time; here every weight is."""
    whole = stock.merged(tmp_path / "whole", base(kind), few, target)
    parts = by_rows(40, base(kind), few, target, tmp_path / "parts", monkeypatch)
    assert stock.differing(stock.tensors(parts), stock.tensors(whole)) == []


@pytest.mark.parametrize("count", [1, 3, 5, 21])
def test_short_row_blocks_change_no_byte(
    dense: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """BLAS takes another path for a product of a few rows, with other last bits: the bytes must not show it, or they
    would depend on the memory and on the number of workers. (64 rows by 21 leave one row at the end.)"""
    whole = stock.merged(tmp_path / "whole", dense, lora, "fp32")
    parts = by_rows(count, dense, lora, "fp32", tmp_path / "parts", monkeypatch)
    assert stock.differing(stock.tensors(parts), stock.tensors(whole)) == []


# --- what is stored --------------------------------------------------------------------------------------------------


def nearest_error(goal: Tensor, levels: Tensor) -> Tensor:
    """Distance to the nearest of the levels, one row of them per entry."""
    return (goal.double()[:, None] - levels.double()).abs().amin(dim=1)


def is_nearest(stored: Tensor, goal: Tensor, levels: Tensor) -> bool:
    """Every entry on the nearest level; within float32's rounding of a midpoint it may be on either side."""
    error = (stored.double() - goal.double()).abs().flatten()
    return bool((error <= nearest_error(goal.flatten(), levels) + 1e-6 * goal.abs().max()).all())


def kept_levels(base: Path, name: str, kind: str) -> Tensor:
    """float32 [entries, levels]: every value that an entry can have on the base's own scales."""
    found = stock.tensors(base)
    if kind == "int8":
        scb = found[name.removesuffix("weight") + "SCB"]
        codes = torch.arange(-127, 128, dtype=torch.int8).repeat(len(scb), 1)
        return bnb.int8_vectorwise_dequant(codes, scb).repeat_interleave(found[name].shape[1], dim=0)
    parts = {other.removeprefix(f"{name}."): part for other, part in found.items() if other.startswith(f"{name}.")}
    state = bnb.QuantState.from_dict(parts, torch.device("cpu"))
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return (state.code * absmax[:, None]).repeat_interleave(state.blocksize, dim=0)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_same_format_takes_the_nearest_on_the_base_scales(base: Made, lora: Path, result: Result, kind: str) -> None:
    stored, goal = stock.values(result(kind, target_of(kind))), exact_merge(base(kind), lora)
    for name in stock.quantized_names(base(kind)):
        assert is_nearest(stored[name], goal[name], kept_levels(base(kind), name, kind)), name


def stored_fresh(values_OI: Tensor, target: str, options: Bnb4bitOptions) -> dict[str, Tensor]:
    """What the stock library stores for these values."""
    if target == "int8":
        return parity.tensors_int8(values_OI)
    if target in DTYPES:
        return {"weight": values_OI.to(DTYPES[target])}
    packed, state = parity.quantized_4bit(values_OI, target, options)
    state.dtype = getattr(torch, options.dtype)
    return parity.tensors_4bit(packed, state)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", BASES)
def test_other_formats_are_stored_as_the_stock_library_does(
    base: Made, lora: Path, result: Result, kind: str, target: str
) -> None:
    """The float32 sum goes through the stock quantizer: the same bytes, scales included."""
    if target == target_of(kind) and kind != "bf16":
        pytest.skip("the base's scales are kept: see above")
    # Double quantization carries over from the base.
    options = Bnb4bitOptions(64, double_quant=kind == "nf4-dq", dtype="bfloat16")
    found, goal = stock.tensors(result(kind, target)), exact_merge(base(kind), lora)
    for name in stock.deltas(models.llama(torch.float32), lora):
        for local, expected in stored_fresh(goal[name], target, options).items():
            assert parity.same(found[name.removesuffix("weight") + local], expected), f"{name} {local}"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_same_format_with_fresh_scales(base: Made, lora: Path, tmp_path: Path, kind: str) -> None:
    out = stock.merged(tmp_path / "out", base(kind), lora, target_of(kind), scales="fresh")
    options = Bnb4bitOptions(64, double_quant=kind == "nf4-dq", dtype="bfloat16")
    found, goal = stock.tensors(out), exact_merge(base(kind), lora)
    for name in stock.quantized_names(base(kind)):
        for local, expected in stored_fresh(goal[name], target_of(kind), options).items():
            assert parity.same(found[name.removesuffix("weight") + local], expected), f"{name} {local}"


@pytest.mark.parametrize("kind", QUANTIZED)
def test_same_format_keeps_scales_and_all_that_is_untouched(base: Made, few: Path, tmp_path: Path, kind: str) -> None:
    before, out = stock.tensors(base(kind)), stock.merged(tmp_path / "out", base(kind), few, target_of(kind))
    touched = {name for name in before if name.endswith(("q_proj.weight", "down_proj.weight"))}
    assert stock.differing(before, stock.tensors(out)) == sorted(touched)


# --- what the stock loader makes of it -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", BASES)
def test_loads_in_transformers(base: Made, lora: Path, result: Result, kind: str, target: str) -> None:
    """Every tensor is taken, the loaded weights are the stored ones, and the logits are those of a float32 model.

    Bounds, all relative to the norm of the logits: float32 arithmetic in another order, DEPTH · 2**-24 · √(inner size)
    times a little room. bitsandbytes' int8 layers round their inputs as well (float16, then 8 bits per row): an error of
    absmax/127/√12 per entry, absmax about three times the rms, so 0.7 % per layer; DEPTH of them at worst add up.
    """
    out = result(kind, target)
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    stored = stock.values(out)
    weights = stock.weights_of(model)
    assert [name for name, value in weights.items() if not torch.equal(value, stored[name])] == []
    bound = DEPTH * 0.007 if target == "int8" else 4 * DEPTH * 2**-24 * 160**0.5
    expected = models.logits(stock.float_model(out))
    assert stock.distance(models.logits(stock.in_float32(model)), expected) < bound
    without = models.logits(stock.float_model(base(kind)))
    assert (
        stock.distance(without, expected) > 3 * DEPTH * 0.007
    )  # the control: the base is not within any of the bounds


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("kind", BASES)
def test_logits_of_the_unmerged_adapter(base: Made, lora: Path, result: Result, kind: str, target: str) -> None:
    """Rounding a weight changes each of its entries by at most one unit roundoff, so a layer's output by as much of its
    norm (less, as errors cancel); DEPTH layers at worst add up. float32: as above, the arithmetic's own error."""
    expected = models.logits(stock.adapted(stock.float_model(base(kind)), lora))
    bound = max(DEPTH * UNIT_ROUNDOFF[target], 4 * DEPTH * 2**-24 * 160**0.5)
    found = models.logits(stock.float_model(result(kind, target)))
    assert stock.distance(found, expected) < bound


@pytest.mark.parametrize("kind", QUANTIZED)
def test_same_files_as_the_stock_library(dense: Path, few: Path, tmp_path: Path, kind: str) -> None:
    """A dense base quantized by qmerge and by transformers: same names, dtypes, shapes, and bytes where untouched."""
    reference = models.quantize(dense, tmp_path / "stock", **settings(kind), **compute_dtype(kind))
    more = {"double_quant": kind == "nf4-dq"} if target_of(kind) != "int8" else {}
    out = stock.merged(tmp_path / "out", dense, few, target_of(kind), **more)
    found, expected = stock.tensors(out), stock.tensors(reference)
    assert described(found) == described(expected)
    assert config(out) == config(reference)
    differing = stock.differing(found, expected)
    assert differing and not [name for name in differing if "q_proj." not in name and "down_proj." not in name]


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("target", ["nf4", "int8", "bf16"])
def test_skip_list(dense: Path, few: Path, tmp_path: Path, kind: str, target: str) -> None:
    """What the base leaves dense stays dense, and the list stays in the config."""
    skip = {"llm_int8_skip_modules": ["k_proj", "lm_head"]}
    base = models.quantize(dense, tmp_path / "base", **settings(kind), **skip)
    out = stock.merged(tmp_path / "out", base, few, target)
    found, before = stock.tensors(out), stock.tensors(base)
    for name in (name for name in before if "k_proj" in name or "lm_head" in name):
        assert parity.same(found[name], before[name])
    assert set(found) >= set(stock.tensors(dense))
    if target != "bf16":
        reference = models.quantize(
            dense, tmp_path / "stock", **settings(kind if kind == f"{target}-dq" else target), **skip
        )
        assert described(found) == described(stock.tensors(reference))
        assert config(out) == config(reference)
        _, info = stock.loaded(out)
        assert not any(info.values()), info


def settings(kind: str) -> dict[str, Any]:
    return dict(stock.BASES[kind] or {})


def described(found: dict[str, Tensor]) -> dict[str, Any]:
    """Names, dtypes and shapes; a quant state is as long as its numbers happen to be."""
    shapes = {name: tensor.shape if ".quant_state." not in name else () for name, tensor in found.items()}
    return {name: (tensor.dtype, shapes[name]) for name, tensor in found.items()}


def compute_dtype(kind: str) -> dict[str, Any]:
    """qmerge computes in the model's dtype unless the base says otherwise; transformers' own default is float32."""
    return {} if kind == "int8" else {"bnb_4bit_compute_dtype": torch.bfloat16}


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("kind", BASES)
def test_dense_targets_are_plain_models(base: Made, dense: Path, result: Result, kind: str, target: str) -> None:
    """Same names and shapes as the dense model; one dtype; its config says so and says nothing of quantization."""
    found = stock.tensors(result(kind, target))
    shapes = {name: tensor.shape for name, tensor in stock.tensors(dense).items()}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert {tensor.dtype for tensor in found.values()} == {DTYPES[target]}
    named = str(DTYPES[target]).removeprefix("torch.")
    assert config(result(kind, target)) == {**config(dense), "dtype": named}


# --- which base ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", QUANTIZED)
def test_trained_on(base: Made, dense: Path, few: Path, tmp_path: Path, kind: str) -> None:
    """The dense base is first quantized as the stock loader does on the fly: only what that would quantize."""
    out = stock.merged(tmp_path / "out", dense, few, "fp32", trained_on=kind)
    assert stock.differing(stock.tensors(out), exact_merge(base(kind), few)) == []
    without = stock.tensors(stock.merged(tmp_path / "plain", dense, few, "fp32"))
    changed = stock.differing(stock.tensors(out), without)  # the control: every linear layer but the head
    assert set(changed) == stock.quantized_names(base(kind))


@pytest.mark.parametrize("kind", QUANTIZED)
def test_trained_on_and_stored_alike(base: Made, dense: Path, few: Path, tmp_path: Path, kind: str) -> None:
    """The same as merging into the checkpoint that the stock library saved."""
    more = {"double_quant": kind == "nf4-dq"} if target_of(kind) != "int8" else {}
    out = stock.merged(tmp_path / "out", dense, few, target_of(kind), trained_on=kind, **more)
    direct = stock.merged(tmp_path / "direct", base(kind), few, target_of(kind))
    assert stock.differing(stock.tensors(out), stock.tensors(direct)) == []


@pytest.mark.parametrize("kind", QUANTIZED)
def test_onto_the_original(base: Made, dense: Path, few: Path, tmp_path: Path, kind: str) -> None:
    """fp32: the dense values plus the delta. Same format: those, on the base's scales; what is untouched stays."""
    more = {"merge_onto": "original", "original": str(dense)}
    out = stock.merged(tmp_path / "fp32", base(kind), few, "fp32", **more)
    goal = exact_merge(dense, few)
    assert stock.differing(stock.tensors(out), goal) == []
    out = stock.merged(tmp_path / "same", base(kind), few, target_of(kind), **more)
    before, stored = stock.tensors(base(kind)), stock.values(out)
    touched = sorted(name for name in before if name.endswith(("q_proj.weight", "down_proj.weight")))
    assert stock.differing(before, stock.tensors(out)) == touched
    for name in touched:
        assert is_nearest(stored[name], goal[name], kept_levels(base(kind), name, kind)), name


# --- GPT-2: weights that lie the other way round ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense bfloat16 GPT-2, its NF4 and int8 versions, and an adapter on its Conv1D layers."""
    folder = tmp_path_factory.mktemp("gpt2")
    dense = models.save(models.gpt2(torch.bfloat16), folder / "bf16")
    made = {kind: models.quantize(dense, folder / kind, **(stock.BASES[kind] or {})) for kind in ("nf4", "int8")}
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    adapters = {
        "adapter": models.adapter(models.gpt2(), folder / "adapter", **targets),
        "few": models.adapter(
            models.gpt2(), folder / "few", **{**targets, "target_modules": ["c_attn", "attn.c_proj"]}
        ),
    }
    return {"bf16": dense, **made, **adapters}


def gpt2_unmerged(gpt2: dict[str, Path], kind: str) -> Tensor:
    return models.logits(stock.adapted(stock.float_model(gpt2[kind]), gpt2["adapter"]))


@pytest.mark.parametrize("target", DTYPES)
def test_gpt2_dense_equals_peft(gpt2: dict[str, Path], tmp_path: Path, target: str) -> None:
    out = stock.merged(tmp_path / "out", gpt2["bf16"], gpt2["adapter"], target)
    wrapped = stock.adapted(stock.float_model(gpt2["bf16"]), gpt2["adapter"]).merge_and_unload()
    found, expected = (
        stock.tensors(out),
        {name: value.to(DTYPES[target]) for name, value in wrapped.state_dict().items()},
    )
    assert found.keys() == expected.keys() - {"lm_head.weight"}
    assert stock.differing(found, {name: expected[name] for name in found}) == []


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_dense_to_quantized(gpt2: dict[str, Path], tmp_path: Path, kind: str) -> None:
    """Untouched modules as the stock library quantizes them; it loads; its logits are those of its stored weights."""
    out = stock.merged(tmp_path / "out", gpt2["bf16"], gpt2["few"], kind)
    found, expected = stock.tensors(out), stock.tensors(gpt2[kind])
    assert described(found) == described(expected)
    touched = {name for name in expected if ".attn." in name and "bias" not in name}
    assert set(stock.differing(found, expected)) <= touched
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    bound = DEPTH * 0.007 if kind == "int8" else 4 * DEPTH * 2**-24 * 256**0.5
    assert stock.distance(models.logits(stock.in_float32(model)), models.logits(stock.float_model(out))) < bound


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_quantized_to_dense(gpt2: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = stock.merged(tmp_path / "out", gpt2[kind], gpt2["adapter"], "fp32")
    found = stock.tensors(out)
    assert found["transformer.h.0.attn.c_attn.weight"].shape == (64, 192)
    model, info = stock.loaded(out)
    assert not any(info.values()), info
    assert stock.distance(models.logits(model), gpt2_unmerged(gpt2, kind)) < 4 * DEPTH * 2**-24 * 256**0.5
    # The square one shows whether it was transposed: its shape does not.
    name = "transformer.h.0.attn.c_proj.weight"
    adapted = models.gpt2(), gpt2["adapter"]
    assert parity.same(found[name], (stock.values(gpt2[kind])[name] + stock.deltas(*adapted)[name].T).T.contiguous())


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_same_format(gpt2: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = stock.merged(tmp_path / "out", gpt2[kind], gpt2["few"], kind)
    touched = {name for name in stock.quantized_names(gpt2[kind]) if ".attn." in name}
    assert set(stock.differing(stock.tensors(out), stock.tensors(gpt2[kind]))) == touched
    deltas = stock.deltas(models.gpt2(), gpt2["few"])
    before, after = stock.values(gpt2[kind]), stock.values(out)
    for name in touched:
        assert is_nearest(after[name], before[name] + deltas[name].T, kept_levels(gpt2[kind], name, kind)), name


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gpt2_trained_on(gpt2: dict[str, Path], tmp_path: Path, kind: str) -> None:
    out = stock.merged(tmp_path / "out", gpt2["bf16"], gpt2["adapter"], "fp32", trained_on=kind)
    direct = stock.merged(tmp_path / "direct", gpt2[kind], gpt2["adapter"], "fp32")
    assert stock.differing(stock.tensors(out), stock.tensors(direct)) == []


# --- how the base lies on the disk -----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["nf4", "bf16"])
@pytest.mark.parametrize("kind", ["bf16", "nf4-dq"])
def test_sharded_base(base: Made, few: Path, tmp_path: Path, kind: str, target: str) -> None:
    """Shards in, shards out, and parts of one weight in different files: the same tensors."""
    whole = stock.tensors(stock.merged(tmp_path / "whole", base(kind), few, target))
    spread = scattered(base(kind), tmp_path / "spread", 3)
    assert stock.differing(stock.tensors(stock.merged(tmp_path / "out", spread, few, target)), whole) == []
    shards = stock.merged(tmp_path / "shards", base(kind), few, target, max_shard_size="20kB")
    assert len(list(shards.glob("*.safetensors"))) > 2
    assert stock.differing(stock.tensors(shards), whole) == []
    _, info = stock.loaded(shards)
    assert not any(info.values()), info


def scattered(folder: Path, to: Path, count: int) -> Path:
    """The same checkpoint in several files, tensors dealt out in turn: no weight has all its parts in one file."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors*"))
    found = stock.tensors(folder)
    names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    where = {name: names[place % count] for place, name in enumerate(sorted(found))}
    for file in names:
        save_file({name: found[name] for name in found if where[name] == file}, to / file, {"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    (to / "model.safetensors.index.json").write_text(json.dumps(index))
    return to


@pytest.mark.parametrize("count", [2, 3])
def test_swapped_shards_are_an_error(base: Made, few: Path, tmp_path: Path, count: int) -> None:
    spread = scattered(base("nf4"), tmp_path / "spread", count)
    first, second = sorted(spread.glob("*.safetensors"))[:2]
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    with pytest.raises(CheckpointError, match=r"is in model-0000\d.*index\.json names model-0000\d"):
        stock.merged(tmp_path / "out", spread, few, "fp32")
    assert not (tmp_path / "out").exists()


# --- controls: a wrong merge is seen by the comparisons above --------------------------------------------------------


def with_tensors(adapter: Path, to: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    shutil.copytree(adapter, to)
    path = to / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    return to


def with_config(adapter: Path, to: Path, **changes: Any) -> Path:
    shutil.copytree(adapter, to)
    edit_json(to / "adapter_config.json", **changes)
    return to


def flipped(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: -tensor if "lora_B" in name else tensor for name, tensor in found.items()}


WRONG: dict[str, tuple[str, Callable[[Path, Path], Path]]] = {
    "sign of B flipped": ("lora", lambda adapter, to: with_tensors(adapter, to, flipped)),
    "alpha ignored": ("lora", lambda adapter, to: with_config(adapter, to, lora_alpha=4)),
    "rslora ignored": ("rslora", lambda adapter, to: with_config(adapter, to, use_rslora=False)),
    "alpha pattern ignored": ("patterns", lambda adapter, to: with_config(adapter, to, alpha_pattern={})),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_a_wrong_merge_is_seen(base: Made, adapter: Made, tmp_path: Path, kind: str, wrong: str) -> None:
    scaling, spoil = WRONG[wrong]
    goal = exact_merge(base(kind), adapter(scaling))
    out = stock.merged(tmp_path / "out", base(kind), spoil(adapter(scaling), tmp_path / "wrong"), "fp32")
    differing = stock.differing(stock.tensors(out), goal)
    assert differing and all(name.endswith(tuple(f"{module}.weight" for module in LINEAR)) for name in differing)
    logits = models.logits(stock.adapted(stock.float_model(base(kind)), adapter(scaling)))
    assert stock.distance(models.logits(stock.float_model(out)), logits) > DEPTH * UNIT_ROUNDOFF["fp16"]


def test_an_adapter_tensor_left_over_is_an_error(dense: Path, few: Path, tmp_path: Path) -> None:
    def more(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**found, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": torch.ones(64)}

    with pytest.raises(AdapterError, match="lora_magnitude_vector"):
        stock.merged(tmp_path / "out", dense, with_tensors(few, tmp_path / "more", more), "fp32")
    assert not (tmp_path / "out").exists()


def test_an_adapter_for_more_layers_is_an_error(dense: Path, lora: Path, tmp_path: Path) -> None:
    def more(found: dict[str, Tensor]) -> dict[str, Tensor]:
        return found | {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in found.items()}

    with pytest.raises(AdapterError, match=r"layers\.2\."):
        stock.merged(tmp_path / "out", dense, with_tensors(lora, tmp_path / "more", more), "fp32")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_merge_without_the_delta_is_seen(base: Made, lora: Path, kind: str) -> None:
    """What dequantizing and quantizing again would give: the base's own codes, which are not the nearest."""
    stored, goal = stock.values(base(kind)), exact_merge(base(kind), lora)
    for name in stock.quantized_names(base(kind)):
        assert not is_nearest(stored[name], goal[name], kept_levels(base(kind), name, kind)), name
