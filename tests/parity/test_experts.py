"""Experts in few bits: gpt-oss' MXFP4 written back, and single experts that stock loaders stack in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from qmerge.errors import CheckpointError, RecipeError
from qmerge.schema import read_report

from .. import models
from . import bases, stock
from .test_models import trained

GATE_UP, DOWN = "model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"
STACKS = [f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in ("gate_up_proj", "down_proj")]

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(bases.needs("mxfp4"))
    return bases.make("mxfp4", tmp_path_factory.mktemp("bases") / "oss")


@pytest.fixture(scope="module")
def lora(oss: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Adapters of attention and of all stacks; ``scale`` is lora_alpha. The delta is some percent of the weight with 0.02."""
    folder = tmp_path_factory.mktemp("adapters")

    @cache
    def make(scale: float = 0.02, experts: bool = True) -> Path:
        place = folder / f"{scale}-{experts}"
        trained(stock.float_model(oss, bases.values(oss)), place, experts, lora_alpha=scale)
        return place

    return make


ROUNDINGS: dict[str, dict[str, str]] = {
    "nearest": {"rounding": "nearest"},
    "stochastic": {"rounding": "stochastic"},
    "preserve": {"rounding": "preserve", "calibration": "none"},
}


def as_matrices(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """[E, I, O] → [E, O, I] for all stacks."""
    return {name: values[name].transpose(1, 2).contiguous() for name in STACKS}


def merged_by_peft(base: Path, adapter: Path, tmp_path: Path) -> dict[str, Tensor]:
    """float32 [E, O, I]: base and delta, by way of the dense target, which test_models.py compares with peft."""
    return as_matrices(stock.tensors(stock.merged(tmp_path / "float32", base, adapter, "fp32")))


def scales_of(folder: Path, name: str) -> Tensor:
    """float32 [E, O, I]: the scale of every value."""
    exponents = stock.tensors(folder)[f"{name}_scales"].double() - 127
    return (2**exponents).float().repeat_interleave(32, dim=-1)


# --- gpt-oss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gpt_oss_comes_back_as_mxfp4(oss: Path, lora: Made, tmp_path: Path, rounding: str) -> None:
    """transformers loads it, and reads the values that were stored. The scales are the base's, and all that is not adapted."""
    out = stock.merged(tmp_path / "out", oss, lora(), "mxfp4", **ROUNDINGS[rounding])
    assert bases.quantization_config(out) == bases.quantization_config(oss)
    before, after = stock.tensors(oss), stock.tensors(out)
    changed = {f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in (0, 1) for p in "qo"}
    assert set(stock.differing(before, after)) == changed | {f"{name}_blocks" for name in STACKS}
    model, info = bases.loads(out)
    assert not any(info.values()), info
    loaded = dict(model.named_parameters())
    stored = bases.oracle(out)
    assert stock.differing({name: loaded[name].float() for name in STACKS}, stored) == []
    report = read_report(out)
    kept = {record.module: record.values["kept"] for record in report.weights}
    base, merged = as_matrices(bases.oracle(oss)), merged_by_peft(oss, lora(), tmp_path)
    for name, values in as_matrices(stored).items():
        delta = merged[name] - base[name]
        share = float(((values - base[name]) * delta).sum() / delta.square().sum())
        assert kept[name] == pytest.approx(share, rel=1e-3), "the report measures what is stored"


def test_nearest_is_the_librarys(oss: Path, lora: Made, tmp_path: Path) -> None:
    """compressed-tensors' rounding to FP4, on the base's scales."""
    from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

    out = stock.merged(tmp_path / "out", oss, lora(), "mxfp4")
    stored = as_matrices(bases.oracle(out))
    for name, merged in merged_by_peft(oss, lora(), tmp_path).items():
        scales = scales_of(oss, name)
        expected = cast_to_fp4((merged / scales).clamp(-6, 6)) * scales
        assert torch.equal(stored[name], expected), name
        assert not torch.equal(stored[name], as_matrices(bases.oracle(oss))[name]), "the control: something moved"


def test_the_other_roundings_keep_what_nearest_loses(oss: Path, lora: Made, tmp_path: Path) -> None:
    """A delta of 1 % of the weight: nearest moves hardly anything; the others keep it, preserve with less error in what the
    adapter reads."""
    kept: dict[str, float] = {}
    read_error: dict[str, float] = {}
    base, merged = as_matrices(bases.oracle(oss)), merged_by_peft(oss, lora(0.005), tmp_path)
    relative = stock.distance(merged[DOWN], base[DOWN])
    assert 0.002 < relative < 0.03
    for rounding in ROUNDINGS:
        out = stock.merged(tmp_path / rounding, oss, lora(0.005), "mxfp4", **ROUNDINGS[rounding])
        stored = as_matrices(bases.oracle(out))
        of_delta = [(merged[name] - base[name], stored[name] - base[name]) for name in STACKS]
        squared = sum(float(delta.square().sum()) for delta, _ in of_delta)
        kept[rounding] = sum(float((delta * change).sum()) for delta, change in of_delta) / squared
        # The inputs that the adapter reads: the right singular vectors of every expert's delta.
        errors = 0.0
        for name in STACKS:
            delta = merged[name] - base[name]
            v_EIR = torch.linalg.svd(delta, full_matrices=False)[2][:, :4].mT
            errors += float(((stored[name] - merged[name]) @ v_EIR).square().sum())
        read_error[rounding] = (errors / squared) ** 0.5
    assert kept["nearest"] < 0.1 and kept["stochastic"] > 0.8 and kept["preserve"] > 0.6, kept
    assert read_error["preserve"] < 0.5 * read_error["stochastic"], read_error
    assert read_error["preserve"] < read_error["nearest"], read_error


def test_experts_without_a_delta_keep_their_bytes(oss: Path, lora: Made, tmp_path: Path) -> None:
    """lora_B of expert 1 is zero: its bytes stay under every rounding, those of the others do not."""
    adapter = shutil.copytree(lora(0.2), tmp_path / "adapter")
    tensors = stock.tensors(adapter)
    for name, tensor in tensors.items():
        if ".experts." in name and "lora_B" in name:
            tensor.view(len(tensor), 4, 4)[:, :, 1] = 0  # [O, rank, expert]
    save_file(tensors, adapter / "adapter_model.safetensors")
    before = stock.tensors(oss)
    for rounding in ROUNDINGS:
        out = stock.merged(tmp_path / rounding, oss, adapter, "mxfp4", **ROUNDINGS[rounding])
        after = stock.tensors(out)
        for name in (f"{stack}_blocks" for stack in STACKS):
            same = [torch.equal(one, other) for one, other in zip(before[name], after[name], strict=True)]
            assert same == [False, True, False, False], (rounding, name)


def test_stacks_that_are_not_adapted_are_copied(oss: Path, lora: Made, tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", oss, lora(experts=False), "mxfp4")
    differing = stock.differing(stock.tensors(oss), stock.tensors(out))
    assert differing and all(".self_attn." in name for name in differing)
    assert read_report(out).actions["copy"] == len(stock.tensors(oss)) - len(differing) - len(STACKS)


def test_a_dense_gpt_oss_gets_fresh_scales(oss: Path, lora: Made, tmp_path: Path) -> None:
    """Its error is not larger than that of compressed-tensors' scales, and transformers loads it as it loads the base."""
    dense = stock.merged(tmp_path / "dense", oss, lora(), "bf16")
    (dense / "qmerge.json").unlink()
    out = stock.merged(tmp_path / "out", dense, lora(experts=False), "mxfp4")
    config = bases.quantization_config(out)
    assert config["quant_method"] == "mxfp4" and "lm_head" in config["modules_to_not_convert"]
    model, info = bases.loads(out)
    assert not any(info.values()), info
    loaded, stored = dict(model.named_parameters()), bases.oracle(out)
    assert stock.differing({name: loaded[name].float() for name in STACKS}, stored) == []
    goal = stock.tensors(dense)
    scheme = bases.compressed.make_scheme("MXFP4A16")
    for name in STACKS:
        rows = goal[name].transpose(1, 2).flatten(0, 1).contiguous()
        packed = bases.compressed.compress(rows, scheme)
        config = {"quant_method": "mxfp4"}
        blocks = packed["weight_packed"].view(*stock.tensors(out)[f"{name}_blocks"].shape)
        scales = packed["weight_scale"].view(*blocks.shape[:-1])
        theirs = bases.mxfp4.read({"w_blocks": blocks, "w_scales": scales}, config, {})["w"]
        wanted = goal[name].float()
        assert stock.distance(stored[name], wanted) <= stock.distance(theirs, wanted) < 0.15, name


def test_what_mxfp4_cannot_store_is_refused(oss: Path, lora: Made, tmp_path: Path) -> None:
    llama = models.save(models.llama(), tmp_path / "llama")
    adapter = stock.fresh_adapter(tmp_path / "llama-lora")
    with pytest.raises(CheckpointError, match="can be stored as mxfp4: expected gpt-oss' experts"):
        stock.merged(tmp_path / "out", llama, adapter, "mxfp4")
    with pytest.raises(RecipeError, match=r"--residual: .* is a stack of matrices"):
        stock.merged(tmp_path / "out", oss, lora(), "mxfp4", residual=4)
    with pytest.raises(RecipeError, match="the other stack of the module be mxfp4"):
        stock.merged(tmp_path / "out", oss, lora(), "mxfp4", promote="50KB")
    damaged = shutil.copytree(oss, tmp_path / "damaged")
    tensors, metadata = bases.read_tensors(damaged)
    tensors[f"{DOWN}_scales"][0, 0, 0] = 255
    save_file(tensors, damaged / "model.safetensors", metadata)
    with pytest.raises(CheckpointError, match="down_proj_scales holds 255"):
        stock.merged(tmp_path / "out", damaged, lora(), "mxfp4")
    assert not (tmp_path / "out").exists()
