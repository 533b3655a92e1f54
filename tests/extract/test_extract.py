"""``qmerge extract``: the extracted LoRA, compared with the merged one, with peft, and with decompositions in float64."""

from __future__ import annotations

import errno
import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from qmerge.checkpoint import folder as folders
from qmerge.errors import CheckpointError, NumbersError, QmergeError, RecipeError, RoomError
from qmerge.extract import Extraction, decompose, difference, extract
from qmerge.extract.adapter import LoraSpool
from qmerge.extract.decompose import lora_factors
from qmerge.extract.result import kept_share, rank_for_all
from qmerge.extract.work import REPORT
from qmerge.safetensors_io import disk
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows

from .. import models
from ..conftest import Cli, snapshot
from ..parity import bases, stock

MODEL, ADAPTER, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
DEPTH = 15
"""Matrices that a token passes through: seven linear layers, twice, and the head."""

UNIT = {"fp32": 2.0**-24, "bf16": 2.0**-8}
"""Largest relative error of one rounding to nearest."""


def products(folder: Path) -> dict[str, Tensor]:
    """Weight name → float32 B A of the factors in the file. (The scale is 1, which peft's logits check.)"""
    found = load_file(folder / ADAPTER)
    return {
        name.removeprefix("base_model.model.").replace("lora_A.weight", "weight"): found[name.replace("_A", "_B")]
        @ A_RI
        for name, A_RI in found.items()
        if "lora_A" in name
    }


def config(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / CONFIG).read_text()))


def unmerged(model: PreTrainedModel, folder: Path) -> PeftModel:
    """The model with the unmerged adapter, loaded by peft; warnings are errors, except those about deprecated functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval()


def distance(model: PreTrainedModel, folder: Path, merged: PreTrainedModel) -> float:
    """Distance of the logits of BASE with the adapter to those of MERGED."""
    return stock.distance(models.logits(unmerged(model, folder)), models.logits(merged))


def changed(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint of one file with changed tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(out / MODEL)
    change(tensors)
    save_file(tensors, out / MODEL, metadata={"format": "pt"})
    return out


def nudged(*names: str, size: float = 0.01) -> Callable[[dict[str, Tensor]], None]:
    """Add noise to the tensors whose name contains one of these words; to all tensors without a word."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(3)
        for name, tensor in tensors.items():
            if not names or any(word in name for word in names):
                tensors[name] = tensor + (torch.randn(tensor.shape, generator=generator) * size).to(tensor.dtype)

    return change


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.llama(torch.float32), tmp_path_factory.mktemp("extract") / "float32")


@pytest.fixture(scope="module")
def tuned(float32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight changed by noise of full rank, as by full fine-tuning."""
    return changed(float32, tmp_path_factory.mktemp("extract") / "tuned", nudged())


# --- a merged LoRA is extracted again --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "dense", "nf4"])
@pytest.mark.parametrize("target", ["fp32", "bf16"])
def test_a_merged_lora_is_extracted(
    kind: str, target: str, lora: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """N = MERGED − BASE − Δ is the rounding of the merge. The best fit of the rank of Δ is at least as close to Δ + N as Δ is,
    so ‖B A − Δ‖ ≤ 2 ‖N‖ ≤ 2 u ‖MERGED‖, and BASE + B A is within u ‖MERGED‖ of MERGED."""
    base: Path = request.getfixturevalue(kind)
    merged = stock.merged(tmp_path / "merged", base, lora, target)
    found = extract(str(merged), str(base), tmp_path / "out", rank=4, device="cpu")

    wanted = stock.deltas(models.llama(torch.float32), lora)
    made = products(tmp_path / "out")
    weights = stock.values(merged)
    assert made.keys() == wanted.keys()
    for name, delta_OI in wanted.items():
        bound = 2 * UNIT[target] * float(weights[name].norm()) + 1e-6 * float(delta_OI.norm())
        assert float((made[name] - delta_OI).norm()) <= bound, name
    if target == "fp32":
        assert max(stock.distance(made[name], wanted[name]) for name in wanted) < 1e-5
    assert (tmp_path / "out" / ADAPTER).stat().st_size == found.nbytes

    model = stock.in_float32(stock.loaded(base)[0]) if kind == "nf4" else stock.float_model(base)
    alone = stock.distance(models.logits(model), models.logits(stock.float_model(merged)))
    bound = DEPTH * max(UNIT[target], 2.0**-18)  # 2^-18: float32 sums in another order
    assert distance(model, tmp_path / "out", stock.float_model(merged)) < bound < alone / 5


def test_no_rank_above_that_of_the_delta_is_used(float32: Path, lora: Path, tmp_path: Path) -> None:
    """Float32 rounding of the merge adds no direction."""
    merged = stock.merged(tmp_path / "merged", float32, lora, "fp32")
    found = extract(str(merged), str(float32), tmp_path / "out", rank=32)
    assert {fit.rank for fit in found.fits} == {4}
    assert config(tmp_path / "out")["r"] == 4 and not found.warnings[1:]  # the delta is as large as these weights


def test_gpt2(tmp_path: Path) -> None:
    """A dense Conv1D is stored as [I, O]; lora_A is [R, I] as always. Names in BASE may lack ``transformer.``, as on the Hub."""
    base = models.save(models.gpt2(), tmp_path / "base")
    layers = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    lora = models.adapter(models.gpt2(), tmp_path / "lora", **layers)
    merged = stock.merged(tmp_path / "merged", base, lora, "fp32")
    bare = changed(base, tmp_path / "bare", lambda tensors: rename(tensors, "transformer."))
    for name in (base, bare):
        out = tmp_path / f"out-{name.name}"
        found = extract(str(merged), str(name), out, rank=4)
        assert len(found.fits) == 8 and config(out)["fan_in_fan_out"] is True
        assert config(out)["target_modules"] == sorted(layers["target_modules"])  # type: ignore[call-overload]
        assert load_file(out / ADAPTER)["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"].shape == (192, 4)
        assert distance(stock.float_model(base), out, stock.float_model(merged)) < 1e-5


def rename(tensors: dict[str, Tensor], prefix: str) -> None:
    for name in list(tensors):
        tensors[name.removeprefix(prefix)] = tensors.pop(name)


def test_gpt2_in_nf4(tmp_path: Path) -> None:
    """A quantized Conv1D is stored as [O, I], the merged dense one as [I, O]; bitsandbytes makes it a linear layer."""
    dense = models.save(models.gpt2(), tmp_path / "dense")
    base = models.quantize(dense, tmp_path / "base", torch.float32, load_in_4bit=True, bnb_4bit_quant_type="nf4")
    lora = models.adapter(models.gpt2(), tmp_path / "lora", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    merged = stock.merged(tmp_path / "merged", base, lora, "fp32")
    found = extract(str(merged), str(base), tmp_path / "out", rank=4)
    assert len(found.fits) == 4 and config(tmp_path / "out")["fan_in_fan_out"] is False
    model = stock.in_float32(stock.loaded(base)[0])
    assert distance(model, tmp_path / "out", stock.float_model(merged)) < DEPTH * 2.0**-18


def test_quantized_on_both_sides(nf4: Path, tmp_path: Path) -> None:
    """MERGED − BASE contains the rounding noise, which has full rank: a warning."""
    lora = stock.fresh_adapter(tmp_path / "lora", size=0.001)
    merged = stock.merged(tmp_path / "merged", nf4, lora, "nf4", rounding="stochastic")
    found = extract(str(merged), str(nf4), tmp_path / "out", rank=4)
    theirs, ours = stock.values(merged), stock.values(nf4)
    for fit in found.fits:
        assert fit.delta_square == pytest.approx(float((theirs[fit.name] - ours[fit.name]).square().sum()), rel=1e-5)
    assert any("rank 4 keeps only" in line for line in found.warnings)


def test_warning_about_another_format(dense: Path, nf4: Path, tmp_path: Path) -> None:
    found = extract(str(nf4), str(dense), tmp_path / "out", rank=4)
    assert any("the difference also contains the rounding error of nf4" in line for line in found.warnings)


@pytest.mark.parametrize("kind", ["gptq-act-order", "awq", "fp8", "ct-int4-asym", "hqq"])
def test_other_formats(kind: str, tmp_path: Path) -> None:
    """BASE is written by the format's own library; the expected values are those that the library reads."""
    pytest.importorskip(bases.needs(kind))
    base = bases.make(kind, tmp_path / "base")
    lora = models.adapter(models.llama(torch.float32, **bases.LLAMA), tmp_path / "lora", size=0.002)
    merged = stock.merged(tmp_path / "merged", base, lora, "fp32")
    found = extract(str(merged), str(base), tmp_path / "out", rank=4)
    assert len(found.fits) == 14 and not found.warnings
    made = products(tmp_path / "out")
    theirs = stock.values(merged)
    ours = bases.values(base)
    for name, delta_OI in made.items():
        assert stock.distance(delta_OI, theirs[name] - ours[name]) < 1e-5


# --- rank and kept share ---------------------------------------------------------------------------------------------


def exact(merged: Path, base: Path) -> dict[str, Tensor]:
    """Squared singular values of every linear layer's delta, by LAPACK in float64."""
    theirs, ours = stock.values(merged), stock.values(base)
    linear = [name for name in ours if name.split(".")[-2] in models.LINEAR]
    return {name: torch.linalg.svdvals((theirs[name] - ours[name]).double()).square() for name in linear}


def test_a_lower_rank_keeps_the_share_of_its_singular_values(float32: Path, lora: Path, tmp_path: Path) -> None:
    merged = stock.merged(tmp_path / "merged", float32, lora, "fp32")
    found = extract(str(merged), str(float32), tmp_path / "out", rank=2)
    squares = exact(merged, float32)
    assert found.fits and found.fits[0].rank == 2
    made = products(tmp_path / "out")
    for fit in found.fits:
        share = float(squares[fit.name][:2].sum() / squares[fit.name].sum())
        assert kept_share([fit]) == pytest.approx(share, abs=1e-5)
        delta_OI = stock.values(merged)[fit.name] - stock.values(float32)[fit.name]
        assert math.sqrt(fit.error_square) == pytest.approx(float((delta_OI - made[fit.name]).norm()), rel=1e-4)
    total = sum(s[:2].sum() for s in squares.values()) / sum(s.sum() for s in squares.values())
    assert found.to_json()["total"]["kept"] == pytest.approx(float(total), abs=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.95, 1.0])
def test_energy_uses_the_smallest_sufficient_rank(energy: float, float32: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(tuned), str(float32), tmp_path / "out", energy=energy)
    squares = exact(tuned, float32)
    ranks = {fit.module: fit.rank for fit in found.fits}
    pattern = config(tmp_path / "out")["rank_pattern"]
    for fit in found.fits:
        shares = squares[fit.name].cumsum(0) / squares[fit.name].sum()
        assert shares[fit.rank - 1] >= energy - 1e-6 and (fit.rank == 1 or shares[fit.rank - 2] < energy + 1e-6)
    usual = config(tmp_path / "out")["r"]
    assert {name: pattern.get(name, usual) for name in ranks} == ranks
    assert config(tmp_path / "out")["alpha_pattern"] == pattern, "the scale is 1 everywhere"
    unmerged(stock.float_model(float32), tmp_path / "out")


def test_rank_for_90_percent_of_all_weights_together(float32: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(tuned), str(float32), tmp_path / "out", rank=4)
    squares = exact(tuned, float32)
    total = sum(float(s.sum()) for s in squares.values())
    shares = [sum(float(s[:rank].sum()) for s in squares.values()) / total for rank in range(1, 65)]
    smallest = next(rank for rank, share in enumerate(shares, 1) if share >= 0.9)
    assert rank_for_all(found.fits, 0.9) == (smallest, True)
    line = next(line for line in found.warnings if "keeps only" in line)
    assert f"keeps only {100 * shares[3]:.0f} % of the difference" in line and f"--rank {smallest} to keep 90 %" in line
    assert "keep MERGED" in line, "white noise is not of low rank"
    again = extract(str(tuned), str(float32), tmp_path / "again", rank=smallest)
    assert 0.9 <= kept_share(again.fits) < 0.9 + 0.05 and not any("keeps only" in line for line in again.warnings)


@pytest.fixture(scope="module")
def noise_OI() -> Tensor:
    """Noise without structure: the hardest case for a randomised method."""
    return torch.randn(1400, 1200, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)], ids=str)
def test_exact_decomposition(shape: tuple[int, int]) -> None:
    """Compared with LAPACK in float64, down to singular values of a millionth of the largest."""
    generator = torch.Generator().manual_seed(1)
    u_OK, v_IK = (torch.linalg.qr(torch.randn(n, 60, generator=generator, dtype=torch.float64)).Q for n in shape)
    delta_OI = (u_OK * torch.logspace(0, -6, 60, dtype=torch.float64) @ v_IK.T).float()
    found = decompose.decompose(delta_OI, 4)
    s_K = torch.linalg.svdvals(delta_OI.double())
    assert found.complete and float((found.s_K - s_K[: len(found.s_K)]).abs().max()) < 2.0**-24
    for rank in (1, 20, 60):
        A_RI, B_OR = lora_factors(found, rank)
        best = float(s_K[rank:].square().sum().sqrt())
        assert float((delta_OI - B_OR @ A_RI).norm()) <= best + 1e-6


@pytest.mark.parametrize("rank", [4, 64, 140])
def test_randomised_is_as_good_as_exact(rank: int, noise_OI: Tensor) -> None:
    """The error is at most 0.1 % larger than that of the best fit (Eckart and Young, LAPACK in float64)."""
    assert min(noise_OI.shape) > decompose.EXACT_SIDE
    found = decompose.decompose(noise_OI, rank)
    assert not found.complete
    A_RI, B_OR = lora_factors(found, rank)
    best = float(torch.linalg.svdvals(noise_OI.double())[rank:].square().sum().sqrt())
    left = float((noise_OI - B_OR @ A_RI).double().norm())
    assert best * (1 - 1e-6) <= left <= best * 1.001


def test_control_without_power_iterations_it_is_worse(noise_OI: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompose, "POWER_ITERATIONS", 0)
    A_RI, B_OR = lora_factors(decompose.decompose(noise_OI, 64), 64)
    best = float(torch.linalg.svdvals(noise_OI.double())[64:].square().sum().sqrt())
    assert float((noise_OI - B_OR @ A_RI).double().norm()) > best * 1.01


def test_randomised_finds_a_low_rank_to_float32_precision() -> None:
    update = models.lora_update((1400, 1200), rank=8)
    delta_OI = update.apply(torch.zeros(update.shape), Rows(0, 1400))
    A_RI, B_OR = lora_factors(found := decompose.decompose(delta_OI, 64), 8)
    assert stock.distance(B_OR @ A_RI, delta_OI) < 1e-6
    assert found.numerical_rank == 8
    assert torch.allclose(A_RI.square().sum(1), B_OR.square().sum(0), rtol=1e-4), "balanced"


def test_large_matrices_end_to_end(float32: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The randomised method gives the same result; a rank beyond the computed singular values is a lower bound."""
    squares = exact(tuned, float32)
    monkeypatch.setattr(decompose, "EXACT_SIDE", 8)
    monkeypatch.setattr(decompose, "OVERSAMPLING", 8)
    found = extract(str(tuned), str(float32), tmp_path / "out", rank=4)
    assert any(not fit.complete for fit in found.fits)
    total = sum(s[:4].sum() for s in squares.values()) / sum(s.sum() for s in squares.values())
    assert kept_share(found.fits) == pytest.approx(float(total), rel=0.02)
    rank, known = rank_for_all(found.fits, 0.9)
    assert not known and any(f"90 % needs --rank {rank} or more" in line for line in found.warnings)
    every = sum(float(s.sum()) for s in squares.values())
    assert sum(float(s[: rank - 1].sum()) for s in squares.values()) < 0.9 * every, "a bound, not a guess"
    monkeypatch.setattr(decompose, "FIRST_RANK", 1)
    found = extract(str(tuned), str(float32), tmp_path / "more", energy=0.5)
    for fit in found.fits:
        assert squares[fit.name][: fit.rank].sum() >= 0.5 * squares[fit.name].sum() * (1 - 1e-5)


# --- outside linear layers -------------------------------------------------------------------------------------------


def test_differences_outside_linear_layers_are_named_and_left_out(float32: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(tuned), str(float32), tmp_path / "out", rank=4)
    assert {other.name for other in found.others} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
        *(f"model.layers.{i}.{name}_layernorm.weight" for i in (0, 1) for name in ("input", "post_attention")),
    }  # fmt: skip
    line = found.warnings[-1]
    assert "7 weights outside linear layers differ" in line and "--save-modules" in line and "embed_tokens" in line
    assert config(tmp_path / "out")["modules_to_save"] is None
    assert all("lora_" in name for name in load_file(tmp_path / "out" / ADAPTER))


def test_saved_modules_complete_the_adapter(float32: Path, tuned: Path, tmp_path: Path) -> None:
    found = extract(str(tuned), str(float32), tmp_path / "out", energy=1.0, save_modules=True)
    assert all(other.saved == "modules_to_save" for other in found.others) and len(found.others) == 7
    assert distance(stock.float_model(float32), tmp_path / "out", stock.float_model(tuned)) < DEPTH * 2.0**-18
    lost = extract(str(tuned), str(float32), tmp_path / "lost", energy=1.0)
    assert lost.others and distance(stock.float_model(float32), tmp_path / "lost", stock.float_model(tuned)) > 0.01


def test_saved_modules_with_a_quantized_base(nf4: Path, lora: Path, tmp_path: Path) -> None:
    """The norms keep the dtype that they have in MERGED."""
    merged = stock.merged(tmp_path / "merged", nf4, lora, "fp32")
    tuned = changed(merged, tmp_path / "tuned", nudged("norm", "embed", "lm_head", size=0.1))
    extract(str(tuned), str(nf4), tmp_path / "out", rank=4, save_modules=True)
    made, theirs = load_file(tmp_path / "out" / ADAPTER), load_file(tuned / MODEL)
    assert torch.equal(made["base_model.model.model.norm.weight"], theirs["model.norm.weight"])
    model = stock.in_float32(stock.loaded(nf4)[0])
    assert distance(model, tmp_path / "out", stock.float_model(tuned)) < DEPTH * 2.0**-18


@pytest.mark.parametrize("copy", [False, True])
def test_tied_embedding(copy: bool, tmp_path: Path) -> None:
    """Stored once, and tied again by peft; a copy of the tied weight in the file is ignored."""
    base = models.save(models.llama(torch.float32, tie_word_embeddings=True), tmp_path / "base")

    def change(tensors: dict[str, Tensor]) -> None:
        nudged("embed", "q_proj")(tensors)
        if copy:
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    merged = changed(base, tmp_path / "merged", change)
    found = extract(str(merged), str(base), tmp_path / "out", energy=1.0, save_modules=True)
    assert [other.name for other in found.others] == ["model.embed_tokens.weight"]
    assert config(tmp_path / "out")["ensure_weight_tying"] is True
    assert distance(tied(base), tmp_path / "out", tied(merged)) < DEPTH * 2.0**-18


def tied(folder: Path) -> PreTrainedModel:
    return stock.loaded(folder)[0].eval()


def test_biases_of_linear_layers(tmp_path: Path) -> None:
    """peft stores them as ``lora_bias``. In one layer only the bias changes."""
    base = models.save(models.gpt2(), tmp_path / "base")
    merged = changed(base, tmp_path / "merged", nudged("c_attn", "h.1.mlp.c_fc.bias", "ln_f"))
    lost = extract(str(merged), str(base), tmp_path / "lost", energy=1.0)
    assert {other.name for other in lost.others} == {
        "transformer.h.0.attn.c_attn.bias", "transformer.h.1.attn.c_attn.bias", "transformer.h.1.mlp.c_fc.bias",
        "transformer.ln_f.weight", "transformer.ln_f.bias",
    }  # fmt: skip
    found = extract(str(merged), str(base), tmp_path / "out", energy=1.0, save_modules=True)
    assert config(tmp_path / "out")["lora_bias"] is True and any("3 biases" in line for line in found.warnings)
    assert distance(stock.float_model(base), tmp_path / "out", stock.float_model(merged)) < DEPTH * 2.0**-18
    assert distance(stock.float_model(base), tmp_path / "lost", stock.float_model(merged)) > 1e-3


def test_biases_where_not_every_layer_has_one(tmp_path: Path) -> None:
    """peft warns that it cannot merge the adapter; unmerged, the model is right."""
    torch.manual_seed(0)
    base = models.save(Qwen2ForCausalLM(Qwen2Config(**models.LLAMA)).float().eval(), tmp_path / "base")
    merged = changed(base, tmp_path / "merged", nudged("proj"))
    extract(str(merged), str(base), tmp_path / "out", energy=1.0, save_modules=True)
    with pytest.warns(UserWarning, match="lora_bias=True"):
        model = PeftModel.from_pretrained(
            stock.float_model(base), tmp_path / "out", autocast_adapter_dtype=False
        ).eval()
    whole = models.logits(stock.float_model(merged))
    assert stock.distance(models.logits(model), whole) < DEPTH * 2.0**-18


def test_an_equal_layer_gets_no_lora(float32: Path, tmp_path: Path) -> None:
    """target_modules has whole names where the last parts would match more layers."""
    merged = changed(float32, tmp_path / "merged", nudged("layers.0.self_attn.q_proj", "v_proj"))
    found = extract(str(merged), str(float32), tmp_path / "out", rank=4)
    wanted = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]
    assert config(tmp_path / "out")["target_modules"] == wanted and found.identical == 11
    model = unmerged(stock.float_model(float32), tmp_path / "out")
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 3


def test_unknown_architecture(float32: Path, tmp_path: Path) -> None:
    """Linear layers are guessed from names and shapes."""
    merged = changed(float32, tmp_path / "merged", nudged())
    base = shutil.copytree(float32, tmp_path / "base")
    for folder in (base, merged):
        models.edit_json(folder / "config.json", model_type="nobody_knows", architectures=["NobodyForCausalLM"])
    found = extract(str(merged), str(base), tmp_path / "out", rank=4)
    assert len(found.fits) == 14 and {other.savable for other in found.others} == {"modules_to_save"}
    assert config(tmp_path / "out")["target_modules"] == sorted(models.LINEAR)


# --- errors and warnings ---------------------------------------------------------------------------------------------


def spoiled(kind: str, float32: Path, tmp_path: Path) -> Path:
    """A MERGED that must be refused."""

    def change(tensors: dict[str, Tensor]) -> None:
        q = "model.layers.0.self_attn.q_proj.weight"
        if kind == "shape":
            tensors[q] = tensors[q][:32].contiguous()
        elif kind == "rows":
            tensors["model.embed_tokens.weight"] = torch.zeros(97, 64)
        elif kind == "missing":
            del tensors[q]
        elif kind == "more":
            tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
            tensors["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(64, 64)
        elif kind == "nan":
            tensors[q][0, 0] = torch.nan
        elif kind == "norm":
            nudged("model.norm")(tensors)

    merged = changed(float32, tmp_path / "merged", change)
    if kind == "type":
        models.edit_json(merged / "config.json", model_type="mistral")
    if kind == "tied":
        models.edit_json(merged / "config.json", tie_word_embeddings=True)
    return merged


@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("shape", CheckpointError, "q_proj.weight has shape [32, 64] in MERGED and [64, 64] in BASE"),
        (
            "rows",
            CheckpointError,
            "embed_tokens.weight has shape [97, 64] in MERGED and [96, 64] in BASE: were tokens added?",
        ),
        ("missing", CheckpointError, "MERGED has no model.layers.0.self_attn.q_proj.weight, which BASE has"),
        ("type", CheckpointError, "MERGED is a 'mistral' model, BASE is a 'llama'"),
        ("tied", CheckpointError, "MERGED ties its output layer to the input embedding, BASE does not"),
        ("nan", NumbersError, "q_proj.weight: MERGED or BASE contains NaN or infinity"),
        ("same", CheckpointError, "do not differ in a linear layer (every weight is the same)"),
        ("norm", CheckpointError, "do not differ in a linear layer (only model.norm.weight)"),
    ],
)
def test_refused(kind: str, error: type[QmergeError], words: str, float32: Path, tmp_path: Path) -> None:
    merged = spoiled(kind, float32, tmp_path)
    with pytest.raises(error) as raised:
        extract(str(merged), str(float32), tmp_path / "out", rank=4, save_modules=True)
    assert words in str(raised.value) and not (tmp_path / "out").exists()


def test_a_weight_that_only_merged_has_is_refused(float32: Path, tmp_path: Path) -> None:
    """By the names of the loaded model; a tensor that is not one of its parameters (an old mask) is ignored."""
    merged = changed(float32, tmp_path / "merged", nudged("q_proj"))
    mask = changed(merged, tmp_path / "mask", lambda t: t.update({"model.rotary_emb.inv_freq": torch.ones(8)}))
    assert extract(str(mask), str(float32), tmp_path / "out", rank=4).fits
    deeper = models.save(models.llama(torch.float32, num_hidden_layers=3), tmp_path / "deeper")
    with pytest.raises(CheckpointError, match=r"MERGED has no model\.layers\.2"):
        extract(str(merged), str(deeper), tmp_path / "no", rank=4)
    with pytest.raises(CheckpointError, match=r"BASE has no model\.layers\.2"):
        extract(str(deeper), str(float32), tmp_path / "no", rank=4)


def test_warning_about_another_base(float32: Path, tmp_path: Path) -> None:
    """Two unrelated models of one architecture."""
    other = models.save(models.llama(torch.float32, seed=9), tmp_path / "other")
    found = extract(str(other), str(float32), tmp_path / "out", rank=4)
    assert found.to_json()["total"]["relative_size"] == pytest.approx(math.sqrt(2), rel=0.05)
    assert "Is BASE the model that MERGED was made from?" in found.warnings[0]
    assert any("keep MERGED" in line for line in found.warnings)


def test_warning_about_another_config(float32: Path, tuned: Path, tmp_path: Path) -> None:
    merged = shutil.copytree(tuned, tmp_path / "merged")
    models.edit_json(merged / "config.json", rms_norm_eps=1e-3)
    found = extract(str(merged), str(float32), tmp_path / "out", rank=4)
    assert any("config.json differs in rms_norm_eps" in line for line in found.warnings)


@pytest.mark.parametrize(
    "settings", [{}, {"rank": 4, "energy": 0.9}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}], ids=str
)
def test_request_is_checked(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--rank|--energy"):
        extract("nowhere", "nothing", tmp_path / "out", **settings)


def test_out_must_be_new_or_empty(float32: Path, tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(RecipeError, match="is not empty"):
        extract(str(tuned), str(float32), tmp_path / "out", rank=4)
    with pytest.raises(RecipeError, match="is inside MERGED"):
        extract(str(tuned), str(float32), tuned / "out", rank=4)
    (tmp_path / "empty").mkdir()
    extract(str(tuned), str(float32), tmp_path / "empty", rank=4)
    assert set(snapshot(tmp_path / "empty")) == {ADAPTER, CONFIG, REPORT}


@pytest.mark.parametrize("when", ["factors", "adapter", "config"])
@pytest.mark.parametrize(
    "kind", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")], ids=["stop", "full"]
)
def test_an_interruption_leaves_nothing_behind(
    when: str, kind: BaseException, float32: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every stage: no file and no new folder."""

    def fail(*_: object, **__: object) -> None:
        raise kind

    real = folders.write_json
    if when == "factors":
        monkeypatch.setattr(LoraSpool, "add", lambda self, *_: within_room(self.path.parent, fail))
    elif when == "adapter":
        monkeypatch.setattr(disk.os, "pwrite", fail)
    else:
        monkeypatch.setattr(
            folders, "write_json",
            lambda path, *given, **more: within_room(path.parent, fail) if path.name == CONFIG else real(path, *given, **more),
        )  # fmt: skip
    expected = RoomError if isinstance(kind, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        extract(str(tuned), str(float32), tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def within_room(folder: Path, fail: Callable[[], None]) -> None:
    with disk.disk_errors(folder):
        fail()


def test_one_weight_at_a_time(float32: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read in blocks of at most BLOCK_ENTRIES values; only the delta of one weight is in memory as a whole."""
    largest = 0
    real = Reader.elements

    def watched(self: Reader, info: Any, start: int, stop: int) -> Tensor:
        nonlocal largest
        largest = max(largest, stop - start)
        return real(self, info, start, stop)

    monkeypatch.setattr(difference, "BLOCK_ENTRIES", 640)
    monkeypatch.setattr(Reader, "elements", watched)
    small = extract(str(tuned), str(float32), tmp_path / "small", rank=4, save_modules=True)
    assert 0 < largest <= 640
    monkeypatch.undo()
    whole = extract(str(tuned), str(float32), tmp_path / "whole", rank=4, save_modules=True)
    assert snapshot(tmp_path / "small")[ADAPTER] == snapshot(tmp_path / "whole")[ADAPTER]
    assert kept_share(small.fits) == pytest.approx(kept_share(whole.fits))


# --- the command -----------------------------------------------------------------------------------------------------


def test_command(cli: Cli, float32: Path, tuned: Path, tmp_path: Path) -> None:
    ran = cli("extract", tuned, float32, "--rank", 4, "--out", tmp_path / "out")
    assert ran.code == 0 and "Contents of the adapter" in ran.out and "7 weights outside linear layers" in ran.err
    table = ran.out.split("Written to")[0]
    assert max(map(len, table.splitlines())) <= 80 and all(name in table for name in (*models.LINEAR, "all"))
    ran = cli("extract", tuned, float32, "--energy", 0.9, "--out", tmp_path / "json", "--json", "--save-modules")
    described = json.loads(ran.out)
    assert described == json.loads((tmp_path / "json" / REPORT).read_text())
    assert described["total"]["n"] == 14 == len(described["weights"]) and described["total"]["kept"] >= 0.9
    assert described["total"]["error"] == pytest.approx(math.sqrt(1 - described["total"]["kept"]))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("--rank", 0), 2), ((), 2), (("--rank", 4, "--energy", 0.5), 2), (("--rank", 4), 3)],
    ids=str,
)
def test_command_refuses(arguments: tuple[Any, ...], code: int, cli: Cli, float32: Path, tmp_path: Path) -> None:
    ran = cli("extract", float32, float32, "--out", tmp_path / "out", *arguments)
    assert ran.code == code and ran.err.startswith("qmerge: ") and ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_adapter_can_be_merged_again(cli: Cli, float32: Path, lora: Path, tmp_path: Path) -> None:
    """qmerge merges the extracted adapter into the same model again."""
    merged = stock.merged(tmp_path / "merged", float32, lora, "fp32")
    assert cli("extract", merged, float32, "--rank", 4, "--out", tmp_path / "out", "--quiet").code == 0
    again = stock.merged(tmp_path / "again", float32, tmp_path / "out", "fp32")
    theirs = stock.values(again)
    for name, values in stock.values(merged).items():
        assert stock.distance(theirs[name], values) < 1e-6


@pytest.mark.parametrize("kind", ["gpt2", "tied"])
def test_other_stored_differences_can_be_merged_again(kind: str, tmp_path: Path) -> None:
    """``lora_bias`` and ``modules_to_save``, with a tied embedding under both of its names."""
    model = models.gpt2() if kind == "gpt2" else models.llama(torch.float32, tie_word_embeddings=True)
    base = models.save(model, tmp_path / "base")
    merged = changed(base, tmp_path / "merged", nudged())
    found = extract(str(merged), str(base), tmp_path / "out", energy=1.0, save_modules=True)
    saved = {other.saved for other in found.others}
    assert saved == ({"modules_to_save", "lora_bias"} if kind == "gpt2" else {"modules_to_save"})
    again = stock.values(stock.merged(tmp_path / "again", base, tmp_path / "out", "fp32"))
    theirs = stock.values(merged)
    assert again.keys() == theirs.keys()
    assert max(stock.distance(again[name], values) for name, values in theirs.items()) < 1e-6


def test_to_json_is_json(float32: Path, tuned: Path, tmp_path: Path) -> None:
    found: Extraction = extract(str(tuned), str(float32), tmp_path / "out", rank=4)
    assert json.loads(json.dumps(found.to_json())) == found.to_json()
