"""Experts in few bits: gpt-oss' MXFP4 written back, and single experts that stock loaders stack in memory."""

from __future__ import annotations

import functools
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import qmerge.demo
from qmerge.errors import CheckpointError, RecipeError
from qmerge.formats import get_target
from qmerge.schema import read_report

from .. import models
from ..calibration.test_calibration import BATCHES, collected, dense_reference, same
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
        (record,) = [record for record in report.weights if record.module == name]
        of_experts = ((values - base[name]) * delta).sum((1, 2)) / delta.square().sum((1, 2))
        assert record.values["expert_kept_min"] == pytest.approx(float(of_experts.min()), rel=1e-3, abs=1e-6)
        assert record.values["expert_kept_median"] == pytest.approx(
            statistics.median(of_experts.tolist()), rel=1e-3, abs=1e-6
        )


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


def test_calibration_sees_the_tokens_of_every_expert(oss: Path, lora: Made, tmp_path: Path) -> None:
    """Against the tokens that the router sends to every expert of the dense adapter model, and what the expert makes of them."""
    model = dense_reference(oss, lora(0.2), tmp_path / "dense")
    seen: dict[str, list[list[Tensor]]] = {part: [[] for _ in range(4)] for part in ("gate_up_proj", "down_proj")}

    def before(experts: Any, args: tuple[Any, ...]) -> None:
        hidden, chosen = args[0], args[1]
        for number in range(4):
            x = hidden[(chosen == number).any(dim=1)]
            seen["gate_up_proj"][number].append(x)
            gate_up = x @ experts.gate_up_proj[number] + experts.gate_up_proj_bias[number]
            seen["down_proj"][number].append(experts._apply_gate(gate_up))

    model.model.layers[0].mlp.experts.register_forward_pre_hook(before)
    with torch.no_grad():
        for ids in BATCHES:
            model(input_ids=ids)
    groups = collected(oss, lora(0.2), target="mxfp4", sequential=False)
    found = {key: value for _, inputs in groups for key, value in inputs.items()}
    for part, of_experts in seen.items():
        inputs = [torch.cat(batches) for batches in of_experts]
        shared = sum(x.T @ x for x in inputs) / sum(len(x) for x in inputs)
        statistics = found[f"model.layers.0.mlp.experts.{part}"]
        assert len(statistics.of_matrices) == 4 and statistics.tokens == sum(len(x) for x in inputs)
        for x, of_matrix in zip(inputs, statistics.of_matrices, strict=True):
            assert of_matrix is not None and of_matrix.tokens == len(x)
            own = min(1.0, len(x) / x.shape[1])
            assert of_matrix.borrowed == pytest.approx(1 - own)
            same(of_matrix.hessian_II, own * (x.T @ x / len(x)) + (1 - own) * shared)


def test_calibrated_preserve_is_nearest_to_the_adapter_model(oss: Path, lora: Made, tmp_path: Path) -> None:
    """Logits on tokens that rounding did not see, against peft's unmerged model in float32. (A toy, with a large delta.)"""
    ids = torch.randint(0, 96, (32, 16), generator=torch.Generator().manual_seed(3))
    text = {"rounding": "preserve", "calibration": "random", "calibration_tokens": 2048, "sequence_length": 16}

    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            result: Tensor = model(input_ids=ids).logits
        return result

    model = stock.float_model(oss, bases.values(oss))
    expected = logits(stock.adapted(model, lora(0.3)))
    found = {}
    for name, settings in {**ROUNDINGS, "calibrated": text}.items():
        out = stock.merged(tmp_path / name, oss, lora(0.3), "mxfp4", **settings)
        found[name] = stock.distance(logits(stock.in_float32(stock.loaded(out)[0])), expected)
    report = read_report(out)
    assert all(record.values["output_kept"] is not None for record in report.weights if ".experts." in record.module)
    assert report.fidelity is not None and (report.fidelity.kl_ratio or 0) > 1e-3, (
        "the judged model has experts in 4 bits"
    )
    assert found["calibrated"] < 0.8 * min(found[name] for name in ROUNDINGS), found


def test_what_mxfp4_cannot_store_is_refused(oss: Path, lora: Made, tmp_path: Path) -> None:
    llama = models.save(models.llama(), tmp_path / "llama")
    adapter = stock.fresh_adapter(tmp_path / "llama-lora")
    with pytest.raises(CheckpointError, match="can be stored as mxfp4: expected gpt-oss' experts"):
        stock.merged(tmp_path / "out", llama, adapter, "mxfp4")
    with pytest.raises(RecipeError, match=r"--residual: .* is a stack of matrices"):
        stock.merged(tmp_path / "out", oss, lora(), "mxfp4", residual=4)
    with pytest.raises(RecipeError, match="the other stack of the module be mxfp4"):
        stock.merged(tmp_path / "out", oss, lora(), "mxfp4", promote="50KB")
    dense = models.save(bases.gpt_oss(), tmp_path / "dense")
    with pytest.raises(RecipeError, match="--trained-on nf4: with --target mxfp4 the linear layers stay dense"):
        stock.merged(tmp_path / "out", dense, lora(experts=False), "mxfp4", trained_on="nf4")
    damaged = shutil.copytree(oss, tmp_path / "damaged")
    tensors, metadata = bases.read_tensors(damaged)
    tensors[f"{DOWN}_scales"][0, 0, 0] = 255
    save_file(tensors, damaged / "model.safetensors", metadata)
    with pytest.raises(CheckpointError, match="down_proj_scales holds 255"):
        stock.merged(tmp_path / "out", damaged, lora(), "mxfp4")
    assert not (tmp_path / "out").exists()


# --- separate experts, which transformers stacks in memory -----------------------------------------------------------


SINGLE: dict[str, tuple[str, dict[str, int], tuple[str, str, str]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}, ("w1", "w3", "w2")),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 128}, ("gate_proj", "up_proj", "down_proj")),
}
"""Model → the start of its classes, its settings, and the names of an expert's matrices on disk."""

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 96, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip

SURVIVAL = {"fp8": 0.04, "mxfp4a16": 0.16, "gptq": 0.12, "awq": 0.12}
"""Target → relative error of nearest rounding, rounded up (test_matrix.py)."""


def model_class(name: str) -> Any:
    return getattr(transformers, f"{SINGLE[name][0]}ForCausalLM")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Base and adapter of a small mixture of experts; the adapter changes the stacks (peft's ``target_parameters``)."""
    folder = tmp_path_factory.mktemp("single")

    @cache
    def make(name: str) -> tuple[Path, Path]:
        start, settings, _ = SINGLE[name]
        config = getattr(transformers, f"{start}Config")(**SIZES, **settings)
        torch.manual_seed(0)
        model = model_class(name)(config).bfloat16()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
        base = models.save(model, folder / name)
        trained(
            model_class(name).from_pretrained(base, dtype=torch.float32), folder / f"{name}-lora", True, lora_alpha=2
        )
        return base, folder / f"{name}-lora"

    return make


def stacked(values: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """``gate_up_proj`` and ``down_proj`` [E, O, I] as transformers stacks them, from values by their names on disk."""

    def of(part: str, number: int) -> Tensor:
        (value,) = [value for key, value in values.items() if f".experts.{number}.{part}." in key]
        return value.float()

    gate, up, down = SINGLE[name][2]
    gate_up = [torch.cat([of(gate, number), of(up, number)]) for number in range(4)]
    return {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack([of(down, number) for number in range(4)])}


def experts_of(model: Any) -> dict[str, Tensor]:
    return {
        part: model.model.layers[0].mlp.experts.get_parameter(part).float() for part in ("gate_up_proj", "down_proj")
    }


@pytest.mark.parametrize("target", ["fp8", "mxfp4a16"])
@pytest.mark.parametrize("name", SINGLE)
def test_transformers_loads_separate_experts(
    single: Callable[[str], tuple[Path, Path]], tmp_path: Path, name: str, target: str
) -> None:
    base, adapter = single(name)
    out = stock.merged(tmp_path / "out", base, adapter, target)
    assert not [k for k in stock.tensors(out) if ".experts." in k and stock.tensors(out)[k].dtype == torch.bfloat16]
    model, info = model_class(name).from_pretrained(out, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(info.values()), info
    stored = stacked(bases.oracle(out), name)
    goal = stacked(stock.tensors(stock.merged(tmp_path / "float32", base, adapter, "fp32")), name)
    before = stacked(stock.tensors(base), name)
    for part, values in experts_of(model).items():
        assert torch.equal(values, stored[part].bfloat16().float()), part
        assert stock.distance(stored[part], goal[part]) < SURVIVAL[target] < stock.distance(before[part], goal[part])
    assert bool(models.logits(model).isfinite().all())
    assert not [line for line in read_report(out).warnings if "stay dense" in line]


GPTQMODEL = """
import sys, torch
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import save_file
folder, backend, values = sys.argv[1:]
torch.compiler.set_stance("force_eager")  # compiling takes longer, and needs a C++ compiler
model = GPTQModel.load(folder, device="cpu", backend=BACKEND[backend], dtype=torch.float16).model
state = {}
for name, layer in model.named_modules():
    if ".experts." in name and hasattr(layer, "qweight"):
        for part in ("qweight", "qzeros", "scales"):
            state[f"{name}.{part}"] = getattr(layer, part).contiguous()
        if hasattr(layer, "dequantize_weight"):
            state[f"{name}.weight"] = layer.dequantize_weight().T.float().contiguous()
assert model(torch.arange(10)[None]).logits.isfinite().all()
save_file(state, values)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("target", "backend"), [("gptq", "GPTQ_TORCH"), ("awq", "AWQ_TORCH")])
def test_gptqmodel_loads_separate_experts(
    single: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str, backend: str
) -> None:
    """In a process of its own: gptqmodel replaces classes of transformers."""
    pytest.importorskip("gptqmodel")
    base, adapter = single("qwen3-moe")
    out = stock.merged(tmp_path / "out", base, adapter, target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(qmerge.demo.__file__).parent / "base-nf4" / name, out)
    file = tmp_path / "values.safetensors"
    command = [sys.executable, "-c", GPTQMODEL, str(out), backend, str(file)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    loaded, written, stored = load_file(file), stock.tensors(out), bases.oracle(out)
    experts = [key for key in written if ".experts." in key and key.endswith(".qweight")]
    assert len(experts) == 4 * 3
    goal = stacked(stock.tensors(stock.merged(tmp_path / "float32", base, adapter, "fp32")), "qwen3-moe")
    for part, values in stacked(stored, "qwen3-moe").items():
        assert stock.distance(values, goal[part]) < SURVIVAL[target]
    for key in experts:
        module = key.removesuffix(".qweight")
        assert torch.equal(loaded[f"{module}.qweight"], written[key]), module
        assert torch.equal(loaded[f"{module}.scales"].float(), written[f"{module}.scales"].float())
        if target == "gptq":
            values = stored[f"{module}.weight"]
            torch.testing.assert_close(loaded[f"{module}.weight"], values, rtol=2**-10, atol=0)
    assert any("transformers 5.23 does not" in line for line in read_report(out).warnings)
    verify = [sys.executable, "-m", "qmerge", "verify", str(out)]
    ran = subprocess.run(verify, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and "with gptqmodel" in ran.stdout, ran.stdout + ran.stderr


@pytest.mark.parametrize("target", ["nf4", "int8", "gptq", "awq", "w8a8", "nvfp4"])
def test_why_transformers_does_not_get_these_experts(
    single: Callable[[str], tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """What the warnings and refusals claim. Where this fails with a later transformers, experts can be quantized."""
    base, adapter = single("qwen3-moe")
    fmt = get_target(target)
    monkeypatch.setattr(fmt, "info", replace(fmt.info, takes_single_experts=True))
    out = stock.merged(tmp_path / "out", base, adapter, target)
    load = functools.partial(
        model_class("qwen3-moe").from_pretrained, out, dtype=torch.bfloat16, output_loading_info=True, device_map="cpu"
    )
    if target in ("nf4", "w8a8"):
        with pytest.raises(RuntimeError):
            load()
        return
    model, info = load()
    if target in ("gptq", "awq"):
        assert any("experts" in key for key in info["missing_keys"])
    elif target == "int8":
        assert any("experts" in str(key) for key in info["unexpected_keys"])
    else:
        stored = stacked(bases.oracle(out), "qwen3-moe")
        assert all(stock.distance(values, stored[part]) > 1 for part, values in experts_of(model).items())


@pytest.mark.parametrize(("target", "reason"), [("nf4", "bitsandbytes' formats"), ("int8", "bitsandbytes' formats")])
def test_experts_that_stay_dense_are_reported(
    single: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str, reason: str
) -> None:
    base, adapter = single("qwen3-moe")
    out = stock.merged(tmp_path / "out", base, adapter, target)
    (line,) = [line for line in read_report(out).warnings if "stay dense" in line]
    assert line.startswith("12 weights of experts stay dense, ") and reason in line
    _, info = model_class("qwen3-moe").from_pretrained(out, output_loading_info=True, device_map="cpu")
    assert not any(info.values()), info


def test_stacks_that_stay_dense_are_reported(oss: Path, lora: Made, tmp_path: Path) -> None:
    out = stock.merged(tmp_path / "out", oss, lora(experts=False), "nf4")
    (line,) = [line for line in read_report(out).warnings if "stay dense" in line]
    assert line.startswith("4 weights of experts stay dense, ")
    assert line.endswith("nf4 stores matrices, and these experts are stacks")


@pytest.mark.parametrize(("target", "reason"), [("w8a8", "not packed"), ("nvfp4", "ignores the global scale")])
def test_experts_that_no_loader_takes_dense_are_refused(
    single: Callable[[str], tuple[Path, Path]], tmp_path: Path, target: str, reason: str
) -> None:
    base, adapter = single("mixtral")
    with pytest.raises(RecipeError, match=f"would stay dense .*{reason}.* use --target w4a16, w8a16, mxfp4a16 or fp8"):
        stock.merged(tmp_path / "out", base, adapter, target)
