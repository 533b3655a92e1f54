"""Adapter keys ↔ weights on disk, against what transformers loads and what peft wraps, on small models that they save."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import conversion_mapping
from transformers import core_model_loading as ops
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from qmerge.checkpoint import architecture
from qmerge.checkpoint import names as module
from qmerge.checkpoint.architecture import meta_model
from qmerge.checkpoint.blocks import DiskBlock, disk_block
from qmerge.checkpoint.conversion import Conversion
from qmerge.checkpoint.names import UNCONVERTED, WITHOUT_CONV1D, Names
from qmerge.checkpoint.traced import TracedTensor, traced_weight
from qmerge.errors import CheckpointError

from ..walk.sizes import tiny_config

TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": False, "max_position_embeddings": 64,
}  # fmt: skip
HEADS = {**TEXT, "head_dim": 8}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
DEFAULT_MROPE = {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}}
EYES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_EYES = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 8,
}
MOE = {**HEADS, "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LOCAL = {**HEADS, "num_local_experts": 12, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", HEADS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}),
    "gemma3-text": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "gemma3": (
        "Gemma3ForConditionalGeneration", "Gemma3Config",
        {"text_config": HEADS, "vision_config": {**EYES, "model_type": "siglip_vision_model"}, "mm_tokens_per_image": 4},
    ),
    "llava": (
        "LlavaForConditionalGeneration", "LlavaConfig",
        {
            "text_config": {**HEADS, "model_type": "llama"},
            "vision_config": {**EYES, "model_type": "clip_vision_model"},
        },
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig",
        {"text_config": {**TEXT, **MROPE}, "vision_config": {**QWEN_EYES, "fullatt_block_indexes": [0]}},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", LOCAL),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", MOE),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", LOCAL),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", LOCAL),
    "granite-moe": ("GraniteMoeForCausalLM", "GraniteMoeConfig", LOCAL),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
        {"text_config": {**MOE, **DEFAULT_MROPE}, "vision_config": {**QWEN_EYES, "deepstack_visual_indexes": [0]}},
    ),
}  # fmt: skip
STACKED = ["mixtral", "qwen3-moe", "phimoe"]
"""Models whose experts are stacked in memory and single on disk."""


@dataclass(frozen=True)
class Made:
    """A folder that transformers saved: its config, its tensors, and the parameters that transformers loads from it."""

    config: dict[str, Any]
    disk: dict[str, Tensor]
    loaded: dict[str, Tensor]

    @property
    def names(self) -> Names:
        return Names(self.config, shapes(self.disk))


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def build(name: str) -> Any:
    model_class, config_class, settings = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, model_class)(getattr(transformers, config_class)(**deepcopy(settings))).eval()


@cache
def made(name: str, old: bool = True, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None) -> Made:
    """``old``: with the names and shapes that the model's files have had on the Hub; else as they are in memory."""
    model = build(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        model.save_pretrained(folder, save_original_format=old)
        disk = load_file(file)
        if edit:
            disk = {key: tensor.contiguous() for key, tensor in edit(disk).items()}
            save_file(disk, file, metadata={"format": "pt"})
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        config = json.loads((Path(folder) / "config.json").read_text())
    return Made(config, disk, {key: p.detach().clone() for key, p in loaded.named_parameters()})


def assembled(blocks: Iterable[DiskBlock], disk: Mapping[str, Tensor]) -> Tensor:
    """The tensor that an adapter names, put together from the disk; every element exactly once."""
    blocks = list(blocks)
    result = torch.full(blocks[0].shape, math.nan)
    for block in blocks:
        values = disk[block.weight]
        for axis, taken in enumerate(block.disk_region):
            values = values.index_select(axis, torch.tensor(taken))
        along = [axis for axis in block.axes if axis is not None]
        values = values.permute(*along, *(axis for axis in range(values.ndim) if axis not in along))
        target = result[tuple(slice(taken.start, taken.stop) for taken in block.region)]
        assert bool(target.isnan().all()), "covered twice"
        target.copy_(values.reshape(target.shape))
    return result


def differing(saved: Made, names: Names) -> list[str]:
    """Parameters that the blocks do not reproduce bit for bit."""
    return [
        key
        for key, values in saved.loaded.items()
        if (blocks := names.blocks_of(key)) is None or not torch.equal(assembled(blocks, saved.disk), values)
    ]


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_make_up_every_parameter_that_transformers_loads(name: str, old: bool) -> None:
    saved = made(name, old)
    names = saved.names
    assert differing(saved, names) == []
    for weight in saved.disk:
        blocks = names.blocks_of(str(names.parameter_of(weight)))
        assert blocks is not None and weight in {block.weight for block in blocks}


def swapped(disk: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.transpose(1, 2) if ".experts." in key else tensor for key, tensor in disk.items()}


def test_experts_that_are_transposed_on_disk() -> None:
    """Old files of Qwen3-VL-MoE have [E, I, O]; transformers looks at the shape."""
    saved = made("qwen3-vl-moe", True, swapped)
    names = saved.names
    assert differing(saved, names) == []
    key = "model.language_model.layers.1.mlp.experts.gate_up_proj"
    blocks = names.blocks_of(key)
    assert blocks is not None and blocks[0].transposed and blocks[0].axes == (0, 2, 1)
    straight = made("qwen3-vl-moe").names.blocks_of(key)
    assert straight is not None and not straight[0].transposed


def test_a_block_has_expert_and_rows() -> None:
    blocks = made("mixtral").names.blocks_of("model.layers.1.mlp.experts.gate_up_proj")
    assert blocks is not None and len(blocks) == 24 and {block.shape for block in blocks} == {(12, 96, 32)}
    w1, w3 = (f"model.layers.1.block_sparse_moe.experts.11.{part}.weight" for part in ("w1", "w3"))
    at = {block.weight: block for block in blocks}
    assert (at[w1].expert, at[w1].rows, at[w1].columns) == (11, range(48), range(32))
    assert (at[w3].expert, at[w3].rows, at[w3].transposed) == (11, range(48, 96), False)
    assert at[w3].axes == (None, 0, 1) and at[w3].covers((48, 32)) and not at[w3].covers((96, 32))


def test_control_a_wrong_mapping_gives_other_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """First gate and up are swapped, then the experts are sorted in another order."""
    saved = made("mixtral")
    wrong = [
        ops.WeightConverter(entry.source_patterns[::-1], entry.target_patterns, entry.operations)
        if isinstance(entry, ops.WeightConverter)
        else entry
        for entry in get_model_conversion_mapping(meta_model(saved.config))
    ]
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: wrong)
    assert differing(saved, saved.names) == [f"model.layers.{k}.mlp.experts.gate_up_proj" for k in range(2)]
    monkeypatch.undo()
    monkeypatch.setattr(ops, "dot_natural_key", lambda name: name)
    assert differing(saved, saved.names) == [
        f"model.layers.{k}.mlp.experts.{part}" for k in range(2) for part in ("gate_up_proj", "down_proj")
    ]


# --- adapters --------------------------------------------------------------------------------------------------------

LINEAR = [
    "q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "c_attn", "c_fc", "qkv", "out_proj", "fc1",
    "linear_1",
]  # fmt: skip


def wrapped(model: Any, target_parameters: list[str]) -> tuple[dict[str, LoraLayer], list[str]]:
    """Key of an adapter that peft makes (without ``.lora_A.weight``) → the layer that peft has there, with a random delta;
    and the ``target_parameters`` that peft saves with it."""
    config = LoraConfig(
        r=2, target_modules=LINEAR, target_parameters=target_parameters or None, init_lora_weights=False
    )
    adapted = get_peft_model(model, config)
    layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
    assert {key.split(".lora_")[0] for key in get_peft_model_state_dict(adapted)} == layers.keys()
    layer_of_key = {name.removeprefix("base_model.model."): layer for name, layer in layers.items()}
    return layer_of_key, list(adapted.peft_config["default"].target_parameters or [])


def parameter_of(layer: Any) -> Tensor:
    """The tensor that peft adds its delta to."""
    parameter: Tensor = layer.get_param() if hasattr(layer, "get_param") else layer.base_layer.weight
    return parameter.detach()


def stacked_in(saved: Made) -> list[str]:
    """``target_parameters`` that target all experts."""
    return sorted(
        {".".join(key.split(".")[-2:]) for key in saved.loaded if key.endswith(("gate_up_proj", "down_proj"))}
    )


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("name", MODELS)
def test_every_key_of_an_adapter_made_by_peft_resolves(name: str, old: bool) -> None:
    saved = made(name, old)
    model, names, stacked = build(name), saved.names, stacked_in(saved)
    model.load_state_dict(saved.loaded, strict=False)
    layers, targets = wrapped(model, stacked)
    assert len(layers) > 3 and bool(stacked) == any(key.endswith(".experts.base_layer") for key in layers)
    for key, layer in layers.items():
        blocks = names.blocks_of(names.targeted_parameter(key, targets))
        assert blocks is not None, key
        assert torch.equal(assembled(blocks, saved.disk), parameter_of(layer)), key


def matrices(layer: Any, expert: int | None) -> tuple[Tensor, Tensor, float]:
    """A, B and scale of the delta of a matrix in memory: of a layer, or of one expert."""
    A, B, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    if expert is None:
        return (B.T, A.T, scale) if getattr(layer, "fan_in_fan_out", False) else (A, B, scale)
    A, B = A.unflatten(0, (layer.num_experts, -1))[expert], B.unflatten(1, (-1, layer.num_experts))[..., expert]
    return (A, B, scale) if layer._did_swap_in_out_features else (B.T, A.T, scale)


def added_on_disk(blocks: Collection[DiskBlock], layer: Any, disk: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Disk weight → the delta that it gets."""
    added = {block.weight: torch.zeros_like(disk[block.weight]) for block in blocks}
    for block in blocks:
        target = added[block.weight]
        every: list[int | None] = [*range(block.shape[0])] if len(block.shape) == 3 else [None]
        experts = every if block.expert is None else [block.expert]
        for expert in experts:
            A, B, scale = matrices(layer, expert)
            A, B = block.factors(A, B, disk[block.weight].shape)
            (target if target.ndim == 2 else target[expert]).add_(B @ A * scale)
    return added


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("old", [True, False], ids=["old", "new"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_added_on_disk_are_the_delta_that_peft_adds(name: str, old: bool) -> None:
    saved = made(name, old)
    names = saved.names
    layers, targets = wrapped(build(name), stacked_in(saved))
    with torch.no_grad():
        for key, layer in layers.items():
            blocks = names.blocks_of(names.targeted_parameter(key, targets))
            assert blocks is not None
            delta = assembled(blocks, added_on_disk(blocks, layer, saved.disk))
            expected = layer.get_delta_weight("default")
            torch.testing.assert_close(delta, expected, rtol=1e-5, atol=1e-6)
            assert float(expected.abs().max()) > 1e-3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_experts_that_are_transposed_on_disk_get_the_delta_transposed() -> None:
    saved = made("qwen3-vl-moe", True, swapped)
    names = saved.names
    layers, targets = wrapped(build("qwen3-vl-moe"), stacked_in(saved))
    key = "model.language_model.layers.0.mlp.experts.base_layer"
    blocks = names.blocks_of(names.targeted_parameter(key, targets))
    assert blocks is not None and len(blocks) == 1 and blocks[0].transposed
    with torch.no_grad():
        added = added_on_disk(blocks, layers[key], saved.disk)
        torch.testing.assert_close(added[blocks[0].weight].mT, layers[key].get_delta_weight("default"))


def test_targeted_parameters_in_any_spelling() -> None:
    names = made("mixtral").names
    both, one = ["experts.gate_up_proj", "mlp.experts.down_proj"], ["gate_up_proj"]
    for block in ("model.layers.1.block_sparse_moe", "model.layers.1.mlp", "layers.1.mlp"):
        experts = "model.layers.1.mlp.experts"
        assert names.targeted_parameter(f"{block}.experts.base_layer", both) == f"{experts}.gate_up_proj"
        assert names.targeted_parameter(f"{block}.experts", both) == f"{experts}.down_proj"
        assert names.targeted_parameter(f"{block}.experts", one) == f"{experts}.gate_up_proj"
    for key in ("model.layers.1.self_attn.q_proj", "model.layers.1.mlp.experts.base_layer.base_layer", "no.such"):
        assert names.targeted_parameter(key, both) == key


@pytest.mark.parametrize("name", [name for name in MODELS if name not in STACKED])
def test_old_and_new_spellings_are_the_same_blocks(name: str) -> None:
    old, new = made(name, True), made(name, False)
    by_parameter = {old.names.parameter_of(weight): weight for weight in old.disk}
    for saved in (old, new):
        names = saved.names
        for parameter, weight in by_parameter.items():
            assert parameter is not None and names.blocks_of(parameter) is not None
            assert names.blocks_of(weight.removesuffix(".weight")) == names.blocks_of(parameter.removesuffix(".weight"))
    renamed = [parameter for parameter, weight in by_parameter.items() if parameter != weight]
    assert bool(renamed) == (name in ("gemma3", "llava", "qwen2.5-vl", "granite-moe"))


@pytest.mark.parametrize("old", [True, False], ids=["single", "stacked"])
@pytest.mark.parametrize("name", STACKED)
def test_keys_of_single_experts_resolve_on_either_disk(name: str, old: bool) -> None:
    """Names of single experts, in the spellings of either library version, with and without the base's prefix."""
    single, saved = made(name, True), made(name, old)
    names = saved.names
    for weight, values in single.disk.items():
        key = weight.removesuffix(".weight")
        for spelled in {key, key.removeprefix("model."), key.replace(".block_sparse_moe.", ".mlp.")}:
            blocks = names.blocks_of(spelled)
            assert blocks is not None, spelled
            assert torch.equal(assembled(blocks, saved.disk), values), spelled


def test_keys_and_disks_with_and_without_the_base_prefix() -> None:
    saved = made("llama")
    bare = {key.removeprefix("model."): shape for key, shape in shapes(saved.disk).items() if key != "lm_head.weight"}
    key = "model.layers.1.self_attn.q_proj"
    for config in (saved.config, {**saved.config, "architectures": ["LlamaModel"]}):
        for disk in (shapes(saved.disk), bare):
            names = Names(config, disk)
            (block,) = names.blocks_of(key) or ()
            assert block.weight in disk and block.weight.endswith("layers.1.self_attn.q_proj.weight")
            assert [p.weight for p in names.blocks_of(key.removeprefix("model.")) or ()] == [block.weight]


# --- names that mean no weight, or more than one ---------------------------------------------------------------------


def test_unknown_keys_and_tied_embeddings_are_none() -> None:
    for name in MODELS:
        names = made(name).names
        for key in ("model.layers.9.self_attn.q_proj", "q_proj", "", "model", "model.layers.0.mlp.experts.99.w1"):
            assert names.blocks_of(key) is None, (name, key)
    saved = made("gemma3-text")
    disk = {key: shape for key, shape in shapes(saved.disk).items() if key != "lm_head.weight"}
    assert Names(saved.config, disk).blocks_of("lm_head") is None
    assert Names(saved.config, disk).parameter_of("lm_head.weight") is None


def test_two_weights_for_one_parameter_are_ambiguous() -> None:
    saved = made("gemma3")
    extra = "model.language_model.layers.0.self_attn.q_proj.weight"
    names = Names(saved.config, {**shapes(saved.disk), extra: (32, 32)})
    assert names.blocks_of("model.language_model.layers.0.self_attn.q_proj") is None
    assert names.blocks_of("language_model.model.layers.0.self_attn.q_proj") is None
    assert names.blocks_of("model.language_model.layers.1.self_attn.q_proj") is not None


@pytest.mark.parametrize("name", STACKED)
def test_experts_that_are_on_disk_twice_are_ambiguous(name: str) -> None:
    """As a stack and one by one: transformers would load one of the two."""
    single, stacked = made(name, True), made(name, False)
    twice = Names(single.config, {**shapes(single.disk), **shapes(stacked.disk)})
    for part in ("gate_up_proj", "down_proj"):
        assert twice.blocks_of(f"model.layers.1.mlp.experts.{part}") is None
        assert stacked.names.blocks_of(f"model.layers.1.mlp.experts.{part}") is not None
    for weight in set(single.disk) - set(stacked.disk):
        assert twice.blocks_of(weight.removesuffix(".weight")) is None, weight
    assert twice.blocks_of("model.layers.1.self_attn.q_proj") is not None


def test_an_architecture_that_transformers_does_not_know_goes_by_the_names_on_disk() -> None:
    names = Names({"model_type": "nobody", "architectures": ["NobodyModel"]}, {"a.b.weight": (4, 2), "a.c": (3,)})
    assert [p.weight for key in ("a.b", "a.c") for p in names.blocks_of(key) or ()] == ["a.b.weight", "a.c"]
    assert names.blocks_of("b") is None and names.parameter_of("a.b.weight") == "a.b.weight"
    assert names.targeted_parameter("a.b.base_layer", ["b.x"]) == "a.b.base_layer"
    assert names.targeted_parameter("a.b", ["b.weight"]) == "a.b.weight"
    apart = Names(names.config, {"a.a.x": (4, 2), "a.b.x": (4, 2), "a.c.x": (4, 2)})
    assert apart.targeted_parameter("a.b", ["x"]) == "a.b.x"
    # Which of two was wrapped first, the disk does not say.
    two = Names(names.config, {"a.b.x": (4, 2), "a.b.y": (4, 2)})
    assert two.targeted_parameter("a.b", ["b.x", "b.y"]) == "a.b" and two.targeted_parameter("a.b", ["b.y"]) == "a.b.y"


def test_a_missing_expert_is_an_error() -> None:
    saved = made("mixtral")
    disk = {key: shape for key, shape in shapes(saved.disk).items() if ".experts.3.w2." not in key}
    with pytest.raises(CheckpointError, match=r"down_proj is \[12, 32, 48\], but .* make up \[11, 32, 48\]"):
        Names(saved.config, disk).blocks_of("model.layers.0.mlp.experts.down_proj")


def test_one_expert_is_found_by_its_own_name_alone() -> None:
    """Whether the others are there or not; but not where it is there in two spellings."""
    saved = made("mixtral")
    key = "model.layers.0.block_sparse_moe.experts.5.w2"
    others = {name: shape for name, shape in shapes(saved.disk).items() if ".experts.3.w2." not in name}
    (block,) = Names(saved.config, others).blocks_of(key) or ()
    assert (block.weight, block.shape) == (f"{key}.weight", (32, 48))
    second = f"{key}.weight".replace(".block_sparse_moe.", ".mlp.")
    twice = Names(saved.config, {**shapes(saved.disk), second: (32, 48)})
    assert twice.blocks_of(key) is None and twice.blocks_of(second.removesuffix(".weight")) is None
    assert twice.blocks_of(key.replace("5", "6")) is not None


class Doubled(ops.ConversionOps):
    def convert(self, input_dict: dict[str, Any], source_patterns: Any, target_patterns: Any, **more: Any) -> Any:
        return {target_patterns[0]: 2 * next(iter(input_dict.values()))[0]}


def test_more_than_a_rearrangement_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = made("llama")
    converter = ops.WeightConverter("o_proj.weight", "o_proj.weight", [Doubled()])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    names = Names({**saved.config, "model_type": "qwen2_vl_text"}, shapes(saved.disk))
    names.__dict__["_tracer"] = module._Tracer(Conversion(meta_model(saved.config)), shapes(saved.disk))
    message = r"layers\.0\.self_attn\.o_proj\.weight, .* by Doubled, cannot be traced to the disk: torch's mul is not"
    with pytest.raises(CheckpointError, match=message):
        names.blocks_of("model.layers.0.self_attn.o_proj")
    assert names.blocks_of("model.layers.0.self_attn.q_proj") is not None


def test_a_flattened_convolution_is_refused() -> None:
    piece = traced_weight("patch.weight", (4, 3, 2, 2)).reshape(4, 12)
    with pytest.raises(CheckpointError, match=r"patch.weight \[4, 3, 2, 2\] with its axes flattened"):
        disk_block(piece.pieces[0], (4, 3, 2, 2), parameter="patch", shape=(4, 12))  # type: ignore[attr-defined]


def test_parameters_that_transformers_converts() -> None:
    stacks = {f"model.layers.{k}.mlp.experts.{part}" for k in range(2) for part in ("gate_up_proj", "down_proj")}
    assert made("mixtral", True).names.converted == stacks
    assert not made("mixtral", False).names.converted, "stacked on disk already"
    assert not made("llama").names.converted and not made("gemma3").names.converted, "only renamed"


def test_a_weight_that_several_layers_share_is_named() -> None:
    """Zamba: peft gives each of the layers a LoRA of its own, and then they are no longer the same."""
    shared = "shared_transf.self_attn.q_proj.weight"
    config = tiny_config("zamba").to_dict()
    names = Names({**config, "architectures": ["ZambaForCausalLM"]}, {f"model.layers.1.{shared}": (64, 64)})
    blocks = names.blocks_of(f"model.layers.1.{shared}")
    assert blocks is not None and blocks[0].weight == f"model.layers.1.{shared}"
    with pytest.raises(
        CheckpointError, match=rf"layers\.3\.{shared} is stored only once, as model\.layers\.1\.{shared}"
    ):
        names.blocks_of(f"model.layers.3.{shared}")
    other = Names(names.config, {"model.layers.0.mamba.A_log": (2, 64)})
    assert other.blocks_of(f"model.layers.3.{shared}") is None, "on this disk, none of the layers has it"


# --- cost ------------------------------------------------------------------------------------------------------------


def test_unconverted_architectures_are_those_that_transformers_does_not_convert() -> None:
    legacy = get_checkpoint_conversion_mapping("legacy")
    for model_type in UNCONVERTED:
        config = transformers.AutoConfig.for_model(model_type)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        assert len(get_model_conversion_mapping(model)) == len(legacy), model_type
        has_conv1d = any(isinstance(layer, Conv1D) for layer in model.modules())
        assert has_conv1d != (model_type in WITHOUT_CONV1D), model_type


@pytest.mark.parametrize("model_type", architecture.USUAL_NAMES)
def test_usual_names_of_embeddings_are_those_of_transformers(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.AutoConfig.for_model(model_type).to_dict()
    config["architectures"] = [architecture.USUAL_NAMES[model_type]]
    names = architecture.embedding_weights(config)
    other = {**config, "architectures": [config["architectures"][0].replace("ForCausalLM", "Model")]}
    assert architecture.embedding_weights(other) is None, "this class has no output embedding"
    monkeypatch.setattr(architecture, "USUAL_NAMES", {})
    assert architecture.embedding_weights(config) == names == ("model.embed_tokens.weight", "lm_head.weight")


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_nothing_is_built_where_names_need_no_conversion(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> Any:
        raise AssertionError("a model was built")

    saved = made(name)
    monkeypatch.setattr(module, "meta_model", refuse)
    assert differing(saved, saved.names) == []


def test_a_large_mixture_takes_no_memory_for_its_weights() -> None:
    """Mixtral-8x22B: 141 billion parameters."""
    settings = {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48}
    config = transformers.MixtralConfig(**settings, architectures=["MixtralForCausalLM"]).to_dict()
    pattern = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
    disk = {
        pattern.format(layer, expert, part): (6144, 16384) if part == "w2" else (16384, 6144)
        for layer in range(56) for expert in range(8) for part in ("w1", "w2", "w3")
    }  # fmt: skip
    names = Names(config, disk)
    blocks = [
        block
        for layer in range(56)
        for part in ("gate_up_proj", "down_proj")
        for block in names.blocks_of(f"model.layers.{layer}.mlp.experts.{part}") or ()
    ]
    assert len(blocks) == len(disk) and all(block.covers(disk[block.weight]) for block in blocks)


# --- tensors that know where their values are on disk ----------------------------------------------------------------


def values_of(tensor: TracedTensor, sources: Mapping[str, Tensor]) -> Tensor:
    result = torch.full(tuple(tensor.shape), math.nan)
    for piece in tensor.pieces:
        block = result[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.size, strict=True))]
        assert bool(block.isnan().all())
        block.copy_(torch.as_strided(sources[piece.weight], piece.size, piece.strides, piece.offset))
    return result


EVERY_NAME = [""]
"""A part of every name: transformers up to 5.18 asks which weights to permute."""
CASES: dict[str, tuple[ops.ConversionOps, list[list[tuple[int, ...]]], int]] = {
    "chunk": (ops.Chunk(dim=0), [[(6, 4)]], 3),
    "chunk, uneven": (ops.Chunk(dim=1), [[(6, 7)]], 3),
    "concatenate": (ops.Concatenate(dim=1), [[(6, 4)], [(6, 1)], [(6, 2)]], 1),
    "interleave": (ops.Interleave(dim=1), [[(3, 8, 5)]], 1),
    "interleave back": (ops.Interleave(dim=0, inverse=True), [[(8, 5)]], 1),
    "stack": (ops.MergeModulelist(dim=0), [[(6, 4)] * 5], 1),
    "stack inside": (ops.MergeModulelist(dim=1), [[(6, 4)] * 5], 1),
    "unstack": (ops.SplitModulelist(dim=0), [[(5, 1, 4)]], 1),
    "transpose": (ops.Transpose(1, 2), [[(2, 3, 4)]], 1),
    "rope": (ops.PermuteForRope(permute_layer_names=EVERY_NAME), [[(16, 5)]], 1),
    "rope back": (ops.PermuteForRope(permute_layer_names=EVERY_NAME, inverse=True), [[(16, 5)]], 1),
    "rope of a bias": (ops.PermuteForRope(permute_layer_names=EVERY_NAME), [[(16,)]], 1),
    "convolution": (ops.Conv3dToLinear(3, (1, 2, 2)), [[(4, 3, 1, 2, 2)]], 1),
    "convolution back": (ops.LinearToConv3d(3, (1, 2, 2)), [[(4, 12)]], 1),
    "ernie": (ops.ErnieFuseAndSplitTextVisionExperts(), [[(3, 2)] * 4, [(3, 2)] * 4], 2),
    "ernie back": (ops.ErnieSplitAndDecoupleTextVisionExperts(), [[(2, 6, 2)], [(2, 6, 2)]], 2),
}
if hasattr(ops, "Split"):  # transformers 5.20 and later
    CASES["split"] = (ops.Split(dim=0), [[(6, 4)]], 2)


@pytest.mark.parametrize("case", CASES)
def test_transformers_operations_do_the_same_to_pieces_as_to_values(case: str) -> None:
    operation, sources, count = CASES[case]
    real = {
        f"s{i}": [
            torch.randn(shape, generator=torch.Generator().manual_seed(9 * i + k)) for k, shape in enumerate(group)
        ]
        for i, group in enumerate(sources)
    }
    named = {f"{key}.{k}": tensor for key, group in real.items() for k, tensor in enumerate(group)}
    blocks = {
        key: [traced_weight(f"{key}.{k}", tuple(t.shape)) for k, t in enumerate(group)] for key, group in real.items()
    }
    parameters = {"t0": torch.empty(2, 4), "t1": torch.empty(4, 4)}
    more = {
        "source_patterns": list(real), "target_patterns": [f"t{k}*" if "back" in case else f"t{k}" for k in range(count)],
        "config": SimpleNamespace(num_attention_heads=2), "full_layer_name": "t0",
        "model": SimpleNamespace(get_parameter=parameters.get),
    }  # fmt: skip
    expected = operation.convert({key: list(group) for key, group in real.items()}, **more)
    traced_results = operation.convert({key: list(group) for key, group in blocks.items()}, **more)
    assert traced_results.keys() == expected.keys()
    for key, values in expected.items():
        assert torch.equal(values_of(traced_results[key], named), values), key  # type: ignore[arg-type]


RESHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((4, 6), (2, 2, 6)), ((4, 6), (24,)), ((24,), (2, 3, 4)), ((4, 6), (3, 8)), ((4, 6), (1, 4, 1, 6, 1)),
    ((1, 4, 1, 6), (4, 6)), ((1, 1), (1,)), ((6, 4), (2, 12)),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new"), RESHAPES)
def test_reshaping_after_cutting_joining_and_turning(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    whole_ = {"a": torch.randn(math.prod(old)), "b": torch.randn(7), "c": torch.randn(old[::-1])}

    def work(a: Tensor, b: Tensor, c: Tensor) -> list[Tensor]:
        mixed = torch.cat([a[5:], b, a[:5]])[: math.prod(old)] if len(a) > 12 else a
        return [mixed.view(old).reshape(new), c.permute(*range(c.ndim)[::-1]).contiguous().view(new)]

    traced_results = work(*[traced_weight(name, tuple(tensor.shape)) for name, tensor in whole_.items()])
    for tensor, values in zip(traced_results, work(*whole_.values()), strict=True):
        assert torch.equal(values_of(tensor, whole_), values)  # type: ignore[arg-type]


def test_control_a_shifted_piece_gives_other_values() -> None:
    sources = {"a": torch.randn(4, 6)}
    tensor = traced_weight("a", (4, 6)).transpose(0, 1)
    assert isinstance(tensor, TracedTensor) and torch.equal(values_of(tensor, sources), sources["a"].T)
    tensor.pieces = [replace(tensor.pieces[0], strides=(6, 1), size=(4, 6))]
    tensor = TracedTensor((4, 6), tensor.pieces)
    assert not torch.equal(values_of(tensor, sources).reshape(6, 4), sources["a"].T)
