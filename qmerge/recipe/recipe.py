"""The checked settings of a merge, and what others may see of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from qmerge import hub, plugins
from qmerge.errors import RecipeError
from qmerge.formats import targets_of_bits
from qmerge.recipe.choices import INPUTS, WITHOUT_EFFECT_ON_WEIGHTS
from qmerge.recipe.consistency import CONSISTENCY_CHECKS
from qmerge.recipe.fields import RecipeFields


class Recipe(RecipeFields):
    """One merge. Fields are named as the command line's options, with ``_`` for ``-``; descriptions are their help texts."""

    @model_validator(mode="after")
    def _check_consistency(self) -> Recipe:
        for check in CONSISTENCY_CHECKS:
            problem = check(self)
            if problem is not None:
                raise RecipeError(problem)
        return self

    def identity(self) -> dict[str, Any]:
        """What must be the same for ``--resume``: everything that can change an output byte of a weight."""
        return self.model_dump(exclude=WITHOUT_EFFECT_ON_WEIGHTS)

    def to_yaml(self) -> str:
        """The recipe as ``qmerge run`` reads it, with all defaults, so that a later version makes the same model."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)

    def published(self) -> Recipe:
        """The recipe as an output may show it to anybody: no absolute path, no name of the user, nothing that only says where
        and with which resources it was run. ``qmerge run`` makes the same model of it."""
        # A model may be moved, and made again with other resources: neither changes a byte.
        changes: dict[str, Any] = {"out": None, "patch": None, "workers": 1, "max_memory": None}
        # Whoever runs the recipe again must not publish by it.
        changes |= {"push_to_hub": None, "private": None}
        for name in INPUTS:
            value = getattr(self, name)
            if isinstance(value, list):
                changes[name] = [hub.published_name(item) for item in value]
            elif value:
                changes[name] = hub.published_name(value)
        for name in ("calibration", "verify"):
            value = getattr(self, name)
            # The path is of no use to anybody else, and may name the user or a customer.
            if value and not _is_hub_dataset(value):
                changes[name] = Path(value).name
        return self.model_copy(update=changes)


def _is_hub_dataset(text: str) -> bool:
    """Whether a text is ``owner/name`` or ``owner/name:file`` on the Hub. A local file of that name would be read first."""
    return bool(hub.HUB_ID.fullmatch(text.partition(":")[0])) and not Path(text).exists()


def make_recipe(settings: dict[str, Any]) -> Recipe:
    """Settings by name → a checked recipe.

    Raises:
        RecipeError: one line about the first thing that is wrong.
    """
    try:
        return Recipe(**settings)
    except ValidationError as cause:
        raise RecipeError(_explain(cause, settings)) from cause


def _explain(problem: ValidationError, settings: dict[str, Any]) -> str:
    """One line about the first error. An unknown key comes first: it is often the reason why another one is missing."""
    # False sorts before True; among equals, min takes the first.
    first = min(problem.errors(), key=lambda error: error["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"recipe: unknown key {name!r}. {plugins.suggestion(name, list(Recipe.model_fields))}"
    bits_alone = targets_of_bits(settings.get("bits"))
    if first["type"] == "missing" and name == "target" and bits_alone:
        return (
            f"target is needed (--target NAME): bits (--bits) do not name it. {bits_alone} Only gptq and mlx take bits"
        )
    if first["type"] == "missing":
        return f"{name} is needed (--{name.replace('_', '-')}): {Recipe.model_fields[name].description}"
    return f"{name}: {first['msg'].removeprefix('Value error, ')}, found {str(first.get('input'))[:80]!r}"
