"""Calibration against forward hooks on a whole dense model; and ``preserve`` from end to end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import qmerge
import qmerge.demo
from qmerge.calibration import texts
from qmerge.calibration.capture import MatrixProduct
from qmerge.calibration.statistics import CalibrationPass, LayerGroups
from qmerge.calibration.sums import InputSums
from qmerge.calibration.texts import CalibrationTokens
from qmerge.checkpoint.journal import Journal
from qmerge.errors import NumbersError
from qmerge.forecast.preflight import run_preflight
from qmerge.planning.plan import make_plan, make_run_context
from qmerge.recipe import make_recipe
from qmerge.rounding.base import InputStatistics
from qmerge.safetensors_io.reader import Reader

from .. import models
from ..conftest import NF4, snapshot

DEMO = Path(qmerge.demo.__file__).parent
BATCHES = [torch.arange(48).view(3, 16) * k % 96 for k in (1, 5, 7)]
GROUPS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def collected(base: Path, adapter: Path, **settings: Any) -> list[tuple[list[str], dict[str, InputStatistics]]]:
    """Every group of a calibration whose steps are stored without any rounding (so that merged and unmerged model are equal)."""
    found = []
    with Reader() as reader:
        plan = make_plan(
            make_recipe(
                {"base": str(base), "adapter": str(adapter), "target": "nf4", "rounding": "preserve", **settings}
            ),
            reader,
        )
        context = make_run_context(plan, reader)
        stored = settings_stored(plan, context)
        tokens = CalibrationTokens(seen=BATCHES, held_out=[], judged_on="", source="text.txt")
        calibration = CalibrationPass(plan, context, tokens, stored_values=stored, report_progress=lambda line: None)
        for steps, inputs in calibration.groups():
            found.append(([step.name for step in steps], inputs))
    return found


def settings_stored(plan: Any, context: Any) -> Any:
    from qmerge.weights.values import merged_values

    return lambda step: merged_values(step, context)


@contextmanager
def inputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Module name → its inputs [tokens, I], collected by forward hooks."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].reshape(-1, args[0].shape[-1]))
        )
        for name in names
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def dense_reference(base: Path, adapter: Path, out: Path) -> Any:
    """The unmerged adapter model as one dense float32 model (other tests compare qmerge's fp32 target with peft)."""
    qmerge.merge(base=str(base), adapter=str(adapter), target="fp32", rounding="nearest", out=str(out), quiet=True)
    return AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def second_moments(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    with inputs_of(model, names) as seen, torch.no_grad():
        for ids in BATCHES:
            model(input_ids=ids)
    return {name: (x := torch.cat(xs)).T @ x / len(x) for name, xs in seen.items()}


def mean_diagonal(moment_II: Tensor) -> float:
    return float(moment_II.diagonal().mean())


def same(found: Tensor, expected: Tensor) -> None:
    """Sums of 144 float32 products, in another order, at the scale where the mean diagonal is 1."""
    expected = expected / mean_diagonal(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Name → (quantized base, adapter)."""
    folder, made = tmp_path_factory.mktemp("calibrated"), {}
    for name, model in {
        "llama": models.llama(), "tied": models.llama(tie_word_embeddings=True), "gpt2": models.gpt2(),
    }.items():  # fmt: skip
        dense = models.save(model, folder / f"{name}-dense")
        targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True} if name == "gpt2" else {}
        made[name] = (
            models.quantize(dense, folder / name, **NF4),
            models.adapter(model, folder / f"{name}-lora", **targets),
        )
    return made


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2"])
def test_hessians_are_those_of_the_unmerged_adapter_model(
    name: str, bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base, adapter = bases[name]
    found = {key: value for _, inputs in collected(base, adapter, sequential=False) for key, value in inputs.items()}
    modules = [key.removesuffix(".weight") for key in found]
    expected = second_moments(dense_reference(base, adapter, tmp_path / "dense"), modules)
    assert len(found) == (8 if name == "gpt2" else 14)
    for module in modules:
        same(found[f"{module}.weight"].hessian_II, expected[module])
        assert found[f"{module}.weight"].tokens == 144 and found[f"{module}.weight"].cross_II is None


def test_a_model_without_its_delta_has_other_hessians(bases: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """The control: the same comparison fails with the base instead of the adapter model."""
    base, adapter = bases["llama"]
    found = {key: value for _, inputs in collected(base, adapter, sequential=False) for key, value in inputs.items()}
    blank = shutil.copytree(adapter, tmp_path / "blank")
    tensors = load_file(blank / "adapter_model.safetensors")
    save_file({key: value * 0 for key, value in tensors.items()}, blank / "adapter_model.safetensors")
    expected = second_moments(dense_reference(base, blank, tmp_path / "dense"), ["model.layers.1.mlp.down_proj"])
    with pytest.raises(AssertionError):
        same(found["model.layers.1.mlp.down_proj.weight"].hessian_II, expected["model.layers.1.mlp.down_proj"])


def test_groups_come_in_the_order_of_the_layer(bases: dict[str, tuple[Path, Path]]) -> None:
    groups = [names for names, _ in collected(*bases["llama"])]
    kinds = [[name.split(".")[-2] for name in names] for names in groups]
    assert kinds == GROUPS * 2
    assert all(len({name.split(".")[2] for name in names}) == 1 for names in groups)


def test_nothing_is_to_be_corrected_where_nothing_was_rounded(bases: dict[str, tuple[Path, Path]]) -> None:
    for _, inputs in collected(*bases["llama"]):
        for statistics in inputs.values():
            cross = statistics.missing_OI if statistics.cross_II is None else statistics.cross_II
            assert cross is not None
            assert float(cross.abs().max()) < 1e-5 * float(statistics.hessian_II.abs().max())


def test_later_groups_see_what_was_stored(
    bases: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group's two moments equal those of two dense models: the unmerged one, and one with all values stored before."""
    base, adapter = bases["llama"]
    unmerged = dense_reference(base, adapter, tmp_path / "dense")
    current = dense_reference(base, adapter, tmp_path / "again")

    def halved(plan: Any, context: Any) -> Any:
        from qmerge.weights.values import merged_values

        return lambda step: 0.9 * merged_values(step, context)

    monkeypatch.setattr(f"{__name__}.settings_stored", halved)
    for names, inputs in collected(base, adapter):
        modules = [name.removesuffix(".weight") for name in names]
        with inputs_of(unmerged, modules) as x, inputs_of(current, modules) as seen, torch.no_grad():
            for ids in BATCHES:
                unmerged(input_ids=ids), current(input_ids=ids)
        for module in modules:
            one, other = torch.cat(x[module]), torch.cat(seen[module])
            found = inputs[f"{module}.weight"]
            same(found.hessian_II, other.T @ other / len(other))
            if found.cross_II is None:
                assert found.missing_OI is not None  # test_what_the_residual_stream_lacks
                current.get_submodule(module).weight.data *= 0.9
                continue
            cross = (one - other).T @ other / len(other) / mean_diagonal(other.T @ other / len(other))
            torch.testing.assert_close(
                found.cross_II, cross, rtol=1e-3, atol=2e-5 * float(found.hessian_II.abs().max())
            )
            current.get_submodule(module).weight.data *= 0.9


def test_what_the_residual_stream_lacks(
    bases: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[(r + T x − r̃ − T x̃) x̃ᵀ] of o_proj and down_proj, against hooks on two dense models."""
    base, adapter = bases["llama"]
    unmerged = dense_reference(base, adapter, tmp_path / "dense")
    current = dense_reference(base, adapter, tmp_path / "again")

    def weakened(plan: Any, context: Any) -> Any:
        from qmerge.weights.values import merged_values

        return lambda step: 0.9 * merged_values(step, context)

    monkeypatch.setattr(f"{__name__}.settings_stored", weakened)
    # The residual stream is the input of the norm in front of each block.
    streams = {"o_proj": "input_layernorm", "down_proj": "post_attention_layernorm"}
    for names, inputs in collected(base, adapter):
        modules = [name.removesuffix(".weight") for name in names]
        kind = modules[0].rpartition(".")[2]
        if kind in streams:
            stream = ".".join([*modules[0].split(".")[:3], streams[kind]])
            with (
                inputs_of(unmerged, [stream, *modules]) as whole,
                inputs_of(current, [stream, *modules]) as seen,
                torch.no_grad(),
            ):
                for ids in BATCHES:
                    unmerged(input_ids=ids), current(input_ids=ids)
            missing, x = torch.cat(whole[stream]) - torch.cat(seen[stream]), torch.cat(seen[modules[0]])
            missing += (torch.cat(whole[modules[0]]) - x) @ current.get_submodule(modules[0]).weight.T
            found = inputs[names[0]].missing_OI
            assert found is not None
            size = mean_diagonal(x.T @ x)
            scale = float(torch.cat(whole[stream]).abs().max() * x.abs().max()) * len(x) / size
            torch.testing.assert_close(found, missing.T @ x / size, rtol=1e-3, atol=1e-5 * scale)
        else:
            assert all(inputs[name].missing_OI is None for name in names)
        for module in modules:
            current.get_submodule(module).weight.data *= 0.9


def test_conv1d_writes_into_the_residual_stream_too(bases: dict[str, tuple[Path, Path]]) -> None:
    """It multiplies all sequences in one row of tokens: the output has another shape than what is added."""
    for names, inputs in collected(*bases["gpt2"]):
        writes = names[0].endswith("c_proj.weight")
        assert all((inputs[name].missing_OI is not None) == writes for name in names)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_pass_through_a_layer_equals_one_per_group(
    name: str, bases: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def halved(plan: Any, context: Any) -> Any:
        from qmerge.weights.values import merged_values

        return lambda step: 0.5 * merged_values(step, context)

    monkeypatch.setattr(f"{__name__}.settings_stored", halved)
    in_one_pass = collected(*bases[name])
    try_out = CalibrationPass._try_out

    def repeated(self: CalibrationPass, *args: Any) -> LayerGroups:
        return replace(try_out(self, *args), once=False)

    monkeypatch.setattr(CalibrationPass, "_try_out", repeated)
    in_repeated_passes = collected(*bases[name])
    assert [names for names, _ in in_one_pass] == [names for names, _ in in_repeated_passes]
    for (_, found), (_, expected) in zip(in_one_pass, in_repeated_passes, strict=True):
        for key, statistics in expected.items():
            assert torch.equal(found[key].hessian_II, statistics.hessian_II)
            cross_II = found[key].cross_II
            if cross_II is None:  # in one pass, the residual stream is followed too
                assert found[key].missing_OI is not None
            else:
                assert torch.equal(cross_II, statistics.cross_II)


# --- experts ---------------------------------------------------------------------------------------------------------

SMALL = {**models.LLAMA, "hidden_size": 32, "intermediate_size": 48}
MIXTURES: dict[str, tuple[Any, str, tuple[str, str, str]]] = {
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)),
        "block_sparse_moe", ("w1", "w3", "w2"),
    ),
    "qwen3-moe": (
        lambda: Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, head_dim=8)
        ),
        "mlp", ("gate_proj", "up_proj", "down_proj"),
    ),
}  # fmt: skip


def experts(name: str, folder: Path) -> tuple[Path, Path, Any]:
    """A dense mixture on disk, an adapter on the experts of layer 0 by their names on disk, and the model."""
    build, block, names = MIXTURES[name]
    torch.manual_seed(0)
    model = build().eval()
    base = models.save(model, folder / name)
    keys = set(load_file(base / "model.safetensors"))
    modules = [f"model.layers.0.{block}.experts.{e}.{part}" for e in range(4) for part in names]
    assert {f"{module}.weight" for module in modules} <= keys, sorted(keys)[:30]
    tensors = {}
    for module in modules:
        rows, columns = (32, 48) if module.endswith(names[2]) else (48, 32)
        tensors[f"base_model.model.{module}.lora_A.weight"] = 0.1 * torch.randn(2, columns)
        tensors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(rows, 2)
    lora = folder / f"{name}-lora"
    lora.mkdir()
    save_file(tensors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [*names], "base_model_name_or_path": "x"}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    return base, lora, model


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_see_the_tokens_that_are_sent_to_them(name: str, tmp_path: Path) -> None:
    """Against every call of torch's linear in a whole merged model, which is matched by the slice of the stacked weight."""
    base, lora, _ = experts(name, tmp_path)
    model = dense_reference(base, lora, tmp_path / "dense")
    model.config._experts_implementation = "eager"
    stacked = {
        n: p for n, p in model.named_parameters() if "layers.0." in n and n.endswith(("gate_up_proj", "down_proj"))
    }
    seen: dict[tuple[str, int], list[Tensor]] = {}
    real = nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        for key, p in stacked.items():
            if weight.untyped_storage().data_ptr() == p.untyped_storage().data_ptr():
                expert = (weight.storage_offset() - p.storage_offset()) // p.stride(0)
                seen.setdefault((key.rpartition(".")[2], expert), []).append(x)
        return real(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(nn.functional, "linear", linear)
        for ids in BATCHES:
            model(input_ids=ids)
    down = MIXTURES[name][2][2]
    groups = collected(base, lora, sequential=False)
    every = {key: value for _, inputs in groups for key, value in inputs.items()}
    found = {key: value for key, value in every.items() if ".experts." in key}
    assert len(found) == 12 and sum(len(xs) for xs in seen.values()) > 0
    for key, statistics in found.items():
        expert, part = int(key.split(".experts.")[1].split(".")[0]), key.split(".")[-2]
        x = torch.cat(seen["down_proj" if part == down else "gate_up_proj", expert])
        assert statistics.tokens == len(x)
        if not statistics.borrowed:
            same(statistics.hessian_II, x.T @ x / len(x))


def test_experts_that_see_little_borrow() -> None:
    names = [f"layer.experts.{e}.w1.weight" for e in range(3)]
    own = {0: torch.eye(8) * 4, 1: torch.diag(torch.arange(8.0))}
    tokens = {names[0]: 12, names[1]: 2, names[2]: 0}
    sums = InputSums(names, torch.device("cpu"))
    sums.tokens = tokens
    sums.leaders = {names[0]: names[0], names[1]: names[1]}
    sums.hessians = {names[e]: own[e] * tokens[names[e]] for e in own}
    result = sums.statistics()
    shared_II = (12 * own[0] + 2 * own[1]) / 14
    assert [result[name].borrowed for name in names] == [0.0, 0.75, 1.0]
    same(result[names[0]].hessian_II, own[0])
    same(result[names[1]].hessian_II, 0.25 * own[1] + 0.75 * shared_II)
    same(result[names[2]].hessian_II, shared_II)


def test_infinite_inputs_are_an_error_that_names_the_weight() -> None:
    sums = InputSums(["layer.q.weight"], torch.device("cpu"))
    sums.add(None, [MatrixProduct(("layer.q.weight",), torch.full((4, 8), torch.inf))])
    with pytest.raises(NumbersError, match=r"layer\.q\.weight: its inputs contain NaN or infinity"):
        sums.statistics()


def test_experts_with_empty_inputs_share_nothing() -> None:
    """Empty tensors have the same address."""
    names = [f"layer.experts.{e}.w1.weight" for e in range(2)]
    sums = InputSums(names, torch.device("cpu"))
    sums.add(None, [MatrixProduct((name,), torch.zeros(0, 8)) for name in names])
    sums.add(None, [MatrixProduct((names[0],), torch.eye(8)), MatrixProduct((names[1],), torch.ones(16, 8))])
    result = sums.statistics()
    same(result[names[0]].hessian_II, torch.eye(8))
    same(result[names[1]].hessian_II, torch.ones(8, 8))


def test_an_expert_with_an_empty_input_has_nothing_to_lend() -> None:
    names = [f"layer.experts.{e}.w1.weight" for e in range(2)]
    sums = InputSums(names, torch.device("cpu"))
    sums.add(None, [MatrixProduct((names[0],), torch.eye(8)), MatrixProduct((names[1],), torch.zeros(0, 8))])
    result = sums.statistics()
    assert result[names[1]].borrowed == 1 and all(bool(result[name].hessian_II.isfinite().all()) for name in names)


def test_the_report_says_which_experts_borrowed(tmp_path: Path) -> None:
    base, lora, _ = experts("mixtral", tmp_path)
    asked = {
        "target": "int8",
        "rounding": "preserve",
        "calibration": "random",
        "calibration_tokens": 32,
        "sequence_length": 16,
    }
    report = qmerge.merge(base=str(base), adapter=str(lora), out=str(tmp_path / "out"), quiet=True, **asked)
    seen = [w.calibration for w in report.data.weights if w.calibration]
    assert len(seen) == 12 and any(s.borrowed > 0 for s in seen) and all(0 <= s.borrowed <= 1 for s in seen)


@pytest.mark.parametrize("untouched", [0, 1, 3])
def test_layers_that_the_adapter_leaves_alone(untouched: int, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    shutil.copy(DEMO / "adapter" / "adapter_config.json", adapter)
    factors = load_file(DEMO / "adapter" / "adapter_model.safetensors")
    others = {name: values for name, values in factors.items() if f".layers.{untouched}." not in name}
    assert 0 < len(others) < len(factors)
    save_file(others, adapter / "adapter_model.safetensors")
    report = qmerge.merge(**asked(tmp_path / "out", adapter=str(adapter)))
    assert report.kl_ratio is not None and report.kl_ratio < 0.1


# --- from end to end -------------------------------------------------------------------------------------------------


def asked(out: Path, **more: Any) -> dict[str, Any]:
    text = {"calibration": str(DEMO / "calibration.txt"), "calibration_tokens": 2048, "sequence_length": 64}
    inputs = {"base": str(DEMO / "base-nf4"), "adapter": str(DEMO / "adapter"), "target": "nf4", "device": "cpu"}
    return {**inputs, "rounding": "preserve", **text, "out": str(out), "quiet": True, **more}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def preserved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preserved") / "out"
    qmerge.merge(**asked(out))
    return out


def test_only_codes_of_adapted_weights_change(preserved: Path) -> None:
    base, merged = tensors_of(DEMO / "base-nf4"), tensors_of(preserved)
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    with safe_open(DEMO / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        adapted = {name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for name in file.keys()}  # noqa: SIM118
    assert changed and changed <= adapted


def test_the_output_is_kept(preserved: Path) -> None:
    """The demo adapter is far below NF4's step: nearest rounding keeps almost nothing of it."""
    report = json.loads((preserved / "qmerge.json").read_text())
    assert report["rounding"] == "preserve" and report["calibration"]["tokens"] == 2560
    assert report["total"]["values"]["output_kept"] > 0.9 and report["total"]["values"]["predicted_kept"] < 0.2
    assert all(w["calibration"]["tokens"] == 2560 and w["calibration"]["borrowed"] == 0 for w in report["weights"])


def test_the_same_again_gives_the_same_bytes(preserved: Path, tmp_path: Path) -> None:
    qmerge.merge(**asked(tmp_path / "again"))
    assert snapshot(tmp_path / "again")["model.safetensors"] == snapshot(preserved)["model.safetensors"]


def test_the_model_is_judged_as_it_was_written(preserved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of the calibration pass are those of ``fidelity``, which reads the finished folder, on the same tokens."""
    report = json.loads((preserved / "qmerge.json").read_text())
    found = report["fidelity"]
    assert found["text_kind"] == "held out" and "which rounding did not see" in found["measured_on"]
    ids = torch.cat(
        texts.token_batches(DEMO / "calibration.txt", DEMO / "base-nf4", tokens=2048, length=64, vocab_size=1024)
    )
    held_out = texts.hold_out(ids, "x").held_out
    monkeypatch.setattr(texts, "token_batches", lambda *_, **__: held_out)
    expected = qmerge.fidelity(out=str(preserved), text=str(DEMO / "heldout.txt"), sequence_length=64, quiet=True)
    for key in ("tokens", "loss_base", "loss_unmerged", "loss_merged", "kl_base", "kl_merged", "top1_agreement"):
        assert found[key] == pytest.approx(getattr(expected, key), rel=1e-5)
    assert 0.9 < found["gain_kept"] < 1.1 and 0 < found["kl_ratio"] < 0.1


def test_measuring_sees_what_merging_stores(preserved: Path) -> None:
    """The values of the merged model come from memory in one and from the file in the other."""
    settings = {name: value for name, value in asked(Path("x")).items() if name != "out"}
    measured = qmerge.measure(**settings)[0].data
    assert measured.total.values == json.loads((preserved / "qmerge.json").read_text())["total"]["values"]


def test_interrupted_between_two_groups(preserved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, done = Journal.step_done, []

    def stops(journal: Journal, name: str, record: dict[str, Any]) -> None:
        done.append(name)
        if len([name for name in done if "proj" in name]) == 9:
            raise KeyboardInterrupt
        real(journal, name, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "step_done", stops)
        qmerge.merge(**asked(tmp_path / "out"))
    qmerge.merge(**asked(tmp_path / "out"), resume=True)
    assert snapshot(tmp_path / "out")["model.safetensors"] == snapshot(preserved)["model.safetensors"]


def test_no_calibration_builds_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("qmerge.calibration.layered.empty_model", refuse)
    report = qmerge.merge(**asked(tmp_path / "out", calibration="none"))
    assert report.data.total.values["output_kept"] is None and report.kept is not None and report.kept > 0.8


def test_auto_is_stochastic_without_calibration(tmp_path: Path) -> None:
    """On a real model, preserve without calibration does damage. Nothing is said about nearest, which rounds no weight."""
    settings = {key: value for key, value in asked(tmp_path).items() if key != "quiet"}
    with Reader() as reader:
        plan = make_plan(make_recipe({**settings, "rounding": "auto", "calibration": "none"}), reader)
        plan, preflight = run_preflight(plan, make_run_context(plan, reader), rounding="auto")
    assert {step.rounding for step in plan.merged} == {"stochastic"}
    assert "preserve would need calibration" in preflight.rounding_reason
    assert not any("nearest" in line for line in preflight.warnings(plan))


@pytest.mark.parametrize(("target", "rounding"), [("nf4", "preserve"), ("bf16", "nearest"), ("fp32", "nearest")])
def test_auto_takes_nearest_where_that_is_enough(target: str, rounding: str, tmp_path: Path) -> None:
    report = qmerge.merge(**asked(tmp_path / "out", target=target, rounding="auto", calibration="random"))
    assert report.data.rounding == rounding and "predicted" in report.data.rounding_reason


def test_an_unknown_architecture_falls_back_unless_calibration_was_asked_for(
    bases: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    base = shutil.copytree(bases["llama"][0], tmp_path / "base")
    models.edit_json(base / "config.json", model_type="nobody_knows", architectures=["NobodyKnows"])
    settings = {
        "base": str(base),
        "adapter": str(bases["llama"][1]),
        "target": "nf4",
        "rounding": "preserve",
        "quiet": True,
    }
    report = qmerge.merge(**settings, out=str(tmp_path / "out"))
    assert report.data.calibration is not None and report.data.calibration.source == "none"
    with pytest.raises(qmerge.errors.CheckpointError, match="cannot build"):
        qmerge.merge(**settings, calibration="random", out=str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()
