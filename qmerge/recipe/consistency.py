"""Settings that do not go together."""

from __future__ import annotations

from collections.abc import Callable

from qmerge.errors import listed
from qmerge.formats import get_target
from qmerge.recipe.choices import CHAIN
from qmerge.recipe.fields import RecipeFields


def _unused_calibration(recipe: RecipeFields) -> str | None:
    if recipe.calibration and recipe.rounding in ("nearest", "stochastic"):
        return f"calibration is for preserve rounding, {recipe.rounding} does not use it: leave one of them out"
    return None


def _two_destinations(recipe: RecipeFields) -> str | None:
    if recipe.out and recipe.patch:
        return (
            f"out ({recipe.out}) and patch ({recipe.patch}): a run writes only one of them; for both, use out, then make the "
            f"patch with: qmerge patch BASE OUT"
        )
    return None


def _push_of_a_patch(recipe: RecipeFields) -> str | None:
    if recipe.push_to_hub and recipe.patch:
        return "push_to_hub uploads a whole model, but patch writes only a difference: use out instead of patch"
    if recipe.private is not None and not recipe.push_to_hub:
        return "private is for push_to_hub, which is not given: leave it out"
    return None


def _density_of_one_adapter(recipe: RecipeFields) -> str | None:
    if recipe.density != 1 and len(recipe.adapters) < 2:
        return "density thins out the deltas of several adapters, but only one is given: leave density out"
    return None


def _chain_of_parts(recipe: RecipeFields) -> str | None:
    if recipe.combine != CHAIN:
        return None
    weighted = [f"{name}={weight:g}" for name, weight in recipe.adapters if weight != 1]
    if weighted:
        found = listed(weighted)
    elif recipe.density != 1:
        found = f"density {recipe.density:g}"
    elif len(recipe.adapters) < 2:
        found = "one adapter"
    else:
        return None
    return (
        f"combine chain applies two or more adapters in full and in order, because each was trained on what those before it "
        f"made; expected neither weights nor density, found {found}"
    )


def _auto_and_max_size(recipe: RecipeFields) -> str | None:
    if recipe.target == "auto" and not recipe.max_size:
        return "target auto needs max_size (--max-size 6GB): without a limit, fp32 is always best"
    if recipe.target != "auto" and recipe.max_size:
        return f"max_size is for target auto, but the target is {recipe.target}: leave max_size out"
    return None


def _promote_of_auto(recipe: RecipeFields) -> str | None:
    if recipe.promote and recipe.target == "auto":
        return "promote adds bytes to a target: name the target, instead of target auto with max_size"
    return None


def _promote_of_dense(recipe: RecipeFields) -> str | None:
    if recipe.promote and get_target(recipe.target).info.is_dense:
        return f"promote leaves weights of a quantized model unquantized, but the target {recipe.target} is dense"
    return None


def _act_order_without_calibration(recipe: RecipeFields) -> str | None:
    # Which inputs matter alike is only known from calibration; with static groups, groups do not depend on it.
    if not recipe.act_order or recipe.static_groups:
        return None
    if recipe.rounding in ("nearest", "stochastic") or recipe.calibration == "none":
        return "act_order groups inputs by what calibration sees of them: it needs preserve rounding, with calibration"
    return None


def _some_adapter(recipe: RecipeFields) -> str | None:
    if not recipe.adapters:
        return "adapter is an empty list: name at least one adapter"
    return None


def _trained_on_and_original(recipe: RecipeFields) -> str | None:
    if recipe.trained_on_format and recipe.original:
        return "trained_on is for a dense base, original is for a quantized one: give only one of them"
    return None


def _unused_original(recipe: RecipeFields) -> str | None:
    if recipe.base.endswith(".gguf"):
        return None  # it may give the config and the tokenizer
    # preserve rounding may use the original while it merges onto the dequantized base.
    if recipe.original and recipe.merge_onto != "original" and recipe.rounding not in ("auto", "preserve"):
        return (
            f"original is given, but merge_onto is 'dequantized' and {recipe.rounding} rounding does not use it: add "
            f"--merge-onto original, or --rounding preserve, or leave original out"
        )
    return None


CONSISTENCY_CHECKS: tuple[Callable[[RecipeFields], str | None], ...] = (
    _unused_calibration,
    _two_destinations,
    _push_of_a_patch,
    _density_of_one_adapter,
    _chain_of_parts,
    _auto_and_max_size,
    _promote_of_auto,
    _promote_of_dense,
    _act_order_without_calibration,
    _some_adapter,
    _trained_on_and_original,
    _unused_original,
)
"""Each returns what is wrong, or None. The first problem is reported."""
