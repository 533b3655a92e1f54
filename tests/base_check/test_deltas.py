"""Was the adapter trained on these weights, by its deltas? Checked with peft's own initializations."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.loftq_utils import _low_rank_decomposition
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from qmerge.adapters.reading.folder import read_adapter
from qmerge.adapters.updates.lora import LoraUpdate
from qmerge.base_check import deltas
from qmerge.base_check.deltas import MODULES, Alignment
from qmerge.errors import AdapterError
from qmerge.planning.plan import make_plan, make_run_context
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from .. import models
from ..conftest import NF4 as NF4_CONFIG
from ..conftest import Cli

TRAINED = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose weights have a spectrum, as trained ones have: singular values fall from 1 to a tenth."""
    model = models.llama(torch.float32, **TRAINED)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            u, s, vt = torch.linalg.svd(weight.data, full_matrices=False)
            weight.data = u @ torch.diag(torch.logspace(0, -1, len(s)) * s.max()) @ vt
    return models.save(model, tmp_path_factory.mktemp("trained") / "base")


def learned(model: PeftModel, size: float = 0.02) -> None:
    """What training does: the factors move by some percent, at random."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape) * parameter.data.std().clamp(min=1e-4) * size


def initialised(base: Path, folder: Path, r: int = 8, alpha: int = 8, **options: Any) -> tuple[PeftModel, Path]:
    """peft's own initialization and a little training, saved as LLaMA-Factory does: the config declares a plain LoRA."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        **{"r": r, "lora_alpha": alpha, "target_modules": models.LINEAR, "task_type": "CAUSAL_LM", **options}
    )
    wrapped = get_peft_model(model, settings)
    learned(wrapped)
    wrapped.save_pretrained(folder)
    models.edit_json(folder / "adapter_config.json", init_lora_weights=True)
    return wrapped, folder


def alignments_of(base: Path, *adapters: object, **settings: Any) -> list[list[Alignment]]:
    recipe = make_recipe(
        {"base": str(base), "adapter": list(map(str, adapters)), "target": "bf16", "device": "cpu", **settings}
    )
    with Reader() as reader:
        plan = make_plan(recipe, reader)
        return deltas.measure_alignments(plan, make_run_context(plan, reader))


def refused(base: Path, *adapters: object, **settings: Any) -> str:
    """The problem, in words; empty where there is none."""
    onto = settings.get("merge_onto", "dequantized")
    return " ".join(
        deltas.find_problem(found, onto) or "" for found in alignments_of(base, *adapters, **settings)
    ).strip()


@pytest.mark.parametrize(
    ("init", "r", "alpha"),
    [("pissa", 8, 8), ("pissa", 4, 16), ("pissa_niter_4", 8, 8), ("olora", 8, 8), ("olora", 8, 4), ("olora", 4, 16)],
)
def test_delta_that_holds_a_part_of_the_base_is_refused(
    base: Path, tmp_path: Path, init: str, r: int, alpha: int
) -> None:
    wrapped, adapter = initialised(base, tmp_path / "adapter", r, alpha, init_lora_weights=init)
    problem = refused(base, adapter)
    assert "residual model" in problem and "path_initial_model_for_weight_conversion" in problem
    wrapped.unload().save_pretrained(tmp_path / "residual")  # the base that it was trained on
    assert not refused(tmp_path / "residual", adapter)


def test_conv1d_is_transposed(tmp_path: Path) -> None:
    """GPT-2's weights are stored as [I, O]."""
    model = models.gpt2()
    gpt2 = models.save(model, tmp_path / "gpt2")
    settings = LoraConfig(r=8, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights="pissa")
    wrapped = get_peft_model(model, settings)
    learned(wrapped)
    wrapped.save_pretrained(tmp_path / "adapter")
    models.edit_json(tmp_path / "adapter" / "adapter_config.json", init_lora_weights=True)
    wrapped.unload().save_pretrained(tmp_path / "residual")
    assert "residual model" in refused(gpt2, tmp_path / "adapter")
    assert not refused(tmp_path / "residual", tmp_path / "adapter")


def test_converted_is_plain(base: Path, tmp_path: Path) -> None:
    """peft's own conversion: rank doubled, on the original base."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = LoraConfig(
        r=4, lora_alpha=4, target_modules=models.LINEAR, init_lora_weights="pissa", task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, settings)
    wrapped.peft_config["default"].init_lora_weights = True  # as peft's docs do it
    wrapped.save_pretrained(tmp_path / "initial")
    wrapped.peft_config["default"].init_lora_weights = "pissa"
    learned(wrapped)
    wrapped.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert json.loads((tmp_path / "converted/adapter_config.json").read_text())["r"] == 8
    assert not refused(base, tmp_path / "converted")


def nf4(weight: torch.Tensor) -> torch.Tensor:
    return bnb.dequantize_4bit(*bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4"))


def loftq(base: Path, folder: Path, steps: int, r: int = 8) -> tuple[Path, Path]:
    """LoftQ as peft's ``loftq_init`` does it (which insists on a GPU), from the same two functions."""
    _, adapter = initialised(base, folder / "adapter", r)
    tensors = load_file(adapter / "adapter_model.safetensors")
    dense = load_file(base / "model.safetensors")
    for name, weight in dense.items():
        if not name.endswith("proj.weight"):
            continue
        left = weight
        for _ in range(steps):
            quantized = nf4(left)
            factors = _low_rank_decomposition(weight - quantized, reduced_rank=r)
            left = weight - factors["L"] @ factors["R"]
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{key}.lora_A.weight": factors["R"].clone(), f"{key}.lora_B.weight": factors["L"].clone()}
        dense[name] = quantized
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    seen = shutil.copytree(base, folder / "seen")
    save_file(dense, seen / "model.safetensors", {"format": "pt"})
    return adapter, seen


@pytest.mark.parametrize("steps", [1, 5])
def test_delta_that_corrects_a_quantization_error_is_refused(base: Path, tmp_path: Path, steps: int) -> None:
    adapter, seen = loftq(base, tmp_path, steps)
    problem = refused(base, adapter)
    assert "LoftQ" in problem and "--trained-on nf4" in problem
    assert not refused(seen, adapter)  # the weights that it was trained on
    assert not refused(base, adapter, trained_on="nf4")
    against = refused(base, adapter, trained_on="nf4", merge_onto="original")
    assert "leave --merge-onto original out" in against


def test_adapter_that_is_in_the_base_already_is_refused(cli: Cli, base: Path, tmp_path: Path) -> None:
    quantized = models.quantize(base, tmp_path / "nf4", torch.float32, **NF4_CONFIG)
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = models.adapter(model, tmp_path / "adapter", size=1e-3)
    assert not refused(quantized, adapter)
    asked = ("--base", quantized, "--adapter", adapter, "--target", "fp32", "--out", tmp_path / "merged")
    assert cli(*asked, "--device", "cpu").code == 0
    with pytest.raises(AdapterError, match=r"merged into this base already, according to its qmerge\.json"):
        refused(tmp_path / "merged", adapter)
    (tmp_path / "merged/qmerge.json").unlink()  # the deltas show it, too
    assert "merged into this base already" in refused(tmp_path / "merged", adapter)


def test_quantized_base_is_checked_too(base: Path, tmp_path: Path) -> None:
    """A PiSSA adapter does not belong on the 4-bit copy of the original either; alone, or among other adapters."""
    quantized = models.quantize(base, tmp_path / "nf4", **NF4_CONFIG)
    _, pissa = initialised(base, tmp_path / "pissa", init_lora_weights="pissa")
    _, plain = initialised(base, tmp_path / "plain", target_modules=["up_proj"])
    _, other = initialised(base, tmp_path / "other", target_modules=["q_proj"], init_lora_weights="pissa")
    assert [bool(deltas.find_problem(found, "")) for found in alignments_of(quantized, plain, other)] == [False, True]
    assert "residual model" in refused(quantized, pissa) and not refused(quantized, plain)
    for settings in (
        {"adapter": [f"{plain}=0.5", f"{pissa}=0.5"]},
        {"adapter": [str(plain), str(pissa)], "combine": "chain"},
    ):
        both = alignments_of(quantized, **settings)  # type: ignore[arg-type]
        assert [bool(deltas.find_problem(found, "dequantized")) for found in both] == [False, True]


def test_every_command_refuses_and_writes_nothing(cli: Cli, base: Path, tmp_path: Path) -> None:
    _, adapter = initialised(base, tmp_path / "adapter", init_lora_weights="pissa")
    common = ("--base", base, "--adapter", adapter, "--target", "bf16", "--device", "cpu")
    for arguments in (("plan", *common), ("measure", *common), (*common, "--out", tmp_path / "out")):
        ran = cli(*arguments)
        assert ran.code == 3 and isinstance(ran.error, AdapterError) and "residual model" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
@pytest.mark.parametrize("size", [1e-3, 0.02, 0.5])
def test_large_but_plain_deltas_pass(base: Path, tmp_path: Path, init: Any, size: float) -> None:
    """A plain delta of any size is accepted."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = models.adapter(model, tmp_path / "a", size, init_lora_weights=init)
    assert not refused(base, adapter)


@pytest.mark.parametrize(("size", "warned"), [(1e-3, False), (0.05, True)])
def test_large_deltas_are_warned_about(cli: Cli, base: Path, tmp_path: Path, size: float, warned: bool) -> None:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = models.adapter(model, tmp_path / "a", size, target_modules=["q_proj", "embed_tokens"])
    ran = cli("--base", base, "--adapter", adapter, "--target", "bf16", "--out", tmp_path / "out", "--device", "cpu")
    assert ran.code == 0 and ("where fine-tuning usually changes" in ran.err) == warned
    lines = json.loads((tmp_path / "out/qmerge.json").read_text())["warnings"]
    about = [line for line in lines if "where fine-tuning usually changes" in line]
    assert bool(about) == warned and not any("embed_tokens" in line for line in about)


def test_chance_stays_below_the_threshold() -> None:
    """The cosine of a delta and the projection of an independent weight has a standard deviation of 1/√rows at most.
    Without that bound, matrices with few rows would exceed the threshold by chance."""
    torch.manual_seed(0)
    cosines = {rows: torch.tensor([chance(rows) for _ in range(500)]) for rows in (8, 512)}
    assert float(cosines[512].std()) < 1.1 / 512**0.5 and float(cosines[512].max()) < deltas.RELATED_COSINE
    assert int((cosines[8] > deltas.RELATED_COSINE).sum()) > 0
    assert not any(alignment(rows=8, to_base=float(c), base_share=1.0).holds_base for c in cosines[8])


def alignment(rows: int, to_base: float, base_share: float) -> Alignment:
    return Alignment(
        module="m",
        rms=1e-3,
        rows=rows,
        relative_size=0.02,
        to_base=to_base,
        base_share=base_share,
        to_error=None,
        error_share=None,
    )


def chance(rows: int) -> float:
    weight, lora = torch.randn(rows, 16), models.lora_update((rows, 16), seed=int(torch.randint(2**31, (1,))))
    delta = lora.apply(torch.zeros(rows, 16), Rows(0, rows))
    projected = weight @ torch.linalg.qr(lora.A_RI.T)[0]
    return float((delta * weight).sum() / delta.norm() / projected.norm())


def test_aligned_but_small_is_not_refused() -> None:
    """A layer that got a little louder: its delta is aligned with the base, but was never taken out of it."""
    louder = alignment(rows=2**10, to_base=0.4, base_share=0.4 / 0.02)
    assert not louder.holds_base and replace(louder, base_share=1.0).holds_base
    assert not replace(louder, base_share=0.0).holds_base  # it was taken out
    assert not replace(louder, to_base=-0.4, base_share=-1.0).holds_base  # weight decay


def test_alignment_against_numpy(base: Path, tmp_path: Path) -> None:
    """Against numpy's own arithmetic, on whole weights."""
    _, adapter = initialised(base, tmp_path / "adapter", init_lora_weights="pissa")
    weights, (found,) = load_file(base / "model.safetensors"), alignments_of(base, adapter)
    with Reader() as reader:
        updates = read_adapter(adapter, reader).updates
    assert len(found) == deltas.MODULES
    for a in found:
        lora, W = updates[f"{a.module}.weight"], weights[f"{a.module}.weight"].double()
        assert isinstance(lora, LoraUpdate)
        D, E = lora.scale * lora.B_OR.double() @ lora.A_RI.double(), W - nf4(W.float()).double()
        P = torch.linalg.pinv(lora.A_RI.double()) @ lora.A_RI.double()
        cos, share = float((D * W).sum() / D.norm() / (W @ P).norm()), float((D * W).sum() / D.square().sum())
        assert a.to_base == pytest.approx(cos, abs=1e-5) and a.base_share == pytest.approx(share, rel=1e-4)
        assert a.to_error == pytest.approx(float((D * E).sum() / D.norm() / (E @ P).norm()), abs=1e-5)
        assert a.relative_size == pytest.approx(float(D.norm() / W.norm()), rel=1e-5) and a.rows == len(W)


def test_inspect_shows_what_is_wrong_with_a_base(cli: Cli, base: Path, dense: Path, tmp_path: Path) -> None:
    _, adapter = initialised(base, tmp_path / "adapter", init_lora_weights="pissa")
    assert cli("inspect", adapter).code == 0  # the folder alone does not show it
    ran = cli("inspect", adapter, "--base", base)
    assert ran.code == 3 and "residual model" in ran.err and "cos(D, W)" in ran.out
    misfit = cli("inspect", adapter, "--base", dense, "--json")
    assert misfit.code == 3 and "Is this the base" in json.loads(misfit.out)["problem"]
    assert cli("inspect", adapter, "--base-revision", "main").code == 2


def test_inspect_sorts_by_the_number_that_it_shows(cli: Cli, dense: Path, lora: Path) -> None:
    ran = cli("inspect", lora, "--base", dense)
    table = ran.out.split("Do its largest deltas contain a part of the base?")[1]
    shown = [float(number) for number in re.findall(r"│ +(\d\.\d+e[-+]\d+) │", table)]
    assert len(shown) == MODULES and shown == sorted(shown, reverse=True) and len(set(shown)) > 1
    described = json.loads(cli("inspect", lora, "--base", dense, "--json").out)
    assert [f"{alignment['rms']:.2e}" for alignment in described["alignments"]] == [f"{number:.2e}" for number in shown]
