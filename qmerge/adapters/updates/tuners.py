"""How each PEFT type names its tensors, and what they show; and which types are not merged, and why (peft 0.21)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qmerge.adapters.updates.shapes import (
    Parts,
    ShapeRule,
    by_axes,
    of_boft,
    of_c3a,
    of_glora,
    of_gralora,
    of_hira,
    of_ia3,
    of_loha,
    of_lokr,
    of_oft,
    of_road,
    of_vblora,
    unknown,
)


@dataclass(frozen=True, kw_only=True)
class Tuner:
    """How the tensors of one PEFT type are named, and what they show by themselves.

    prefix        beginning of the names of its tensors, within their module or above all modules
    shape         the (O, I) that the tensors of a module and the config show
    shared        tensors above all modules that each module's delta is made of
    projection    of these, tensors that peft saves only with ``save_option``
    save_option   option that makes peft save, and load, what it could also draw again
    rebuilt_from  what drawing it again depends on, and no adapter contains
    drawn         beginnings of the names of tensors that can be drawn again from seeds, shapes and the order of all layers
    changes_bias  whether the layer's bias changes, given the module's parts
    """

    prefix: str
    shape: ShapeRule = unknown
    shared: tuple[str, ...] = ()
    projection: tuple[str, ...] = ()
    save_option: str = ""
    rebuilt_from: str = ""
    drawn: tuple[str, ...] = ()
    changes_bias: Callable[[Parts], bool] = lambda parts: False


def glora_bias_parts(parts: Parts) -> list[str]:
    """GLoRA's parameters that peft makes only where the layer has a bias."""
    bias_parts: list[str] = []
    for part in parts:
        if part.startswith(("glora_C.", "glora_D.", "glora_E.")) and not part.endswith(".zeros"):
            bias_parts.append(part)
    return bias_parts


GENERATOR = "the largest in and out features of all targeted layers in the model"
DECOMPOSITION = "a joint decomposition of the weights of all layers of a kind"
LAYER_ORDER = "the order of all targeted layers in the model"
LAYER_SHAPES = "the shapes and the order of all targeted layers in the model"

TUNERS: dict[str, Tuner] = {
    "ADALORA": Tuner(prefix="lora_", shape=by_axes("lora_B", 0, "lora_A", 1)),
    # Its tensors are biases: of the weight they show nothing.
    "BEFT": Tuner(prefix="beft_"),
    "BOFT": Tuner(prefix="boft_", shape=of_boft),
    "C3A": Tuner(prefix="c3a_", shape=of_c3a),
    "DEFT": Tuner(prefix="deft_", shape=by_axes("deft_P", 0, "deft_R", 1)),
    "DELORA": Tuner(prefix="delora_", shape=by_axes("delora_B", 0, "delora_A", 1)),
    "FOURIERFT": Tuner(prefix="fourierft_"),
    "FROD": Tuner(
        prefix="frod_",
        shape=by_axes("", 0, "frod_lambda_l", 0),
        projection=("frod_V", "frod_s_indices", "frod_s_size"),
        save_option="save_projection",
        rebuilt_from=DECOMPOSITION,
    ),
    "GLORA": Tuner(prefix="glora_", shape=of_glora, changes_bias=lambda parts: bool(glora_bias_parts(parts))),
    "GRALORA": Tuner(prefix="gralora_", shape=of_gralora),
    "HIRA": Tuner(prefix="hira_", shape=of_hira),
    "HRA": Tuner(prefix="hra_", shape=by_axes("", 0, "hra_u", 0)),
    "IA3": Tuner(prefix="ia3_", shape=of_ia3, changes_bias=lambda parts: parts["ia3_l"].shape[1] == 1),
    "LN_TUNING": Tuner(prefix="ln_tuning_"),
    "LOHA": Tuner(prefix="hada_", shape=of_loha),
    "LOKR": Tuner(prefix="lokr_", shape=of_lokr),
    "MISS": Tuner(prefix="miss_"),
    "OFT": Tuner(prefix="oft_", shape=of_oft),
    "OSF": Tuner(prefix="osf_", shape=by_axes("osf_svd_params.U_low", 0, "osf_svd_params.V_low", 1)),
    "PEANUT": Tuner(prefix="peanut_", shape=by_axes("peanut_B.weight", 0, "", 0)),
    "PSOFT": Tuner(prefix="psoft_"),
    "PVERA": Tuner(
        prefix="pvera_",
        shape=by_axes("pvera_lambda_b", 0, "", 0),
        projection=("pvera_A", "pvera_B"),
        save_option="save_projection",
        rebuilt_from=GENERATOR,
        drawn=("pvera_A", "pvera_B"),
    ),
    "RANDLORA": Tuner(
        prefix="randlora_",
        projection=("randlora_A", "randlora_B"),
        save_option="save_projection",
        rebuilt_from=GENERATOR,
        drawn=("randlora_A", "randlora_B"),
    ),
    "ROAD": Tuner(prefix="road_", shape=of_road, changes_bias=lambda parts: True),
    "SHIRA": Tuner(prefix="shira_"),
    "SUPERTUNING": Tuner(prefix="supertuning_"),
    # Its factors of the base are in the file, whether the projection is or not.
    "TINYLORA": Tuner(
        prefix="tinylora_",
        shape=by_axes("tinylora_B", 0, "tinylora_A", 1),
        shared=("tinylora_v",),
        save_option="save_projection",
        rebuilt_from=LAYER_ORDER,
        drawn=("tinylora_P",),
    ),
    "TRAINABLE_TOKENS": Tuner(prefix="trainable_tokens_", shape=by_axes("", 0, "trainable_tokens_delta", 1)),
    "UNILORA": Tuner(
        prefix="unilora_",
        shared=("unilora_theta_d",),
        save_option="save_indices",
        rebuilt_from=LAYER_SHAPES,
        drawn=("unilora_indices", "unilora_scales"),
    ),
    "VBLORA": Tuner(prefix="vblora_", shape=of_vblora, shared=("vblora_vector_bank",)),
    "VERA": Tuner(
        prefix="vera_",
        shape=by_axes("vera_lambda_b", 0, "", 0),
        projection=("vera_A", "vera_B"),
        save_option="save_projection",
        rebuilt_from=GENERATOR,
        drawn=("vera_A", "vera_B"),
    ),
    "WAVEFT": Tuner(prefix="waveft_"),
}
"""peft_type → how to read it (peft 0.21). A type that is new in peft must be added to this table or to ``REFUSED``: a test asks."""

PROMPTS = (
    "it adds virtual tokens or cached states to the input and changes no weight; load it with peft, next to the model"
)
ROUTED = "the input decides which of its parts are applied, so no one weight can replace it; load it with peft, next to the model"
REFUSED: dict[str, str] = {
    "PROMPT_TUNING": PROMPTS,
    "MULTITASK_PROMPT_TUNING": PROMPTS,
    "P_TUNING": PROMPTS,
    "PREFIX_TUNING": PROMPTS,
    "CPT": PROMPTS,
    "CARTRIDGE": PROMPTS,
    "ADAPTION_PROMPT": (
        "it adds attention over learned prompts to every layer, which no weight can hold; load it with peft, next to the model"
    ),
    "XLORA": ROUTED,
    "POLY": ROUTED,
    "LILY": ROUTED,
    "SHADOW": "it runs a second, small network next to the model; load both with peft",
    "ADAMSS": (
        "its subspaces are clusters that are computed again from the base's weight and bias together, with scikit-learn, and are "
        "not saved; merge it with peft into the 16-bit base that it was trained on, then quantize the result"
    ),
}
"""peft_type → why it is not merged, and what to do."""

INDEX_PARTS = (
    "shira_indices",
    "supertuning_indices",
    "_topk_indices",
    "unilora_indices",
    "frod_s_indices",
    "frod_s_size",
)
"""Parts of the names of tensors that may hold integers."""
