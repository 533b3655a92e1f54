"""Recipes in YAML files, and the inputs that those of finished models name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qmerge import hub
from qmerge.checkpoint.plain_yaml import UNREADABLE, AliasError, PlainLoader
from qmerge.errors import RecipeError, listed
from qmerge.recipe.choices import INPUTS
from qmerge.recipe.recipe import Recipe
from qmerge.recipe.values import split_weight

# Bytes. No recipe is larger; a larger file, such as a checkpoint, was given by mistake.
LARGEST_YAML = 2**20


def find_inputs(settings: Mapping[str, Any], output: Path, *, strict: bool = False) -> dict[str, Any]:
    """The inputs that the recipe of a finished model names, as they are found from here.

    Args:
        settings: of the recipe; see ``Recipe.published``.
        output: the folder of the model.

    Returns:
        The fields among ``INPUTS``, with names that lead to the inputs.

    Raises:
        RecipeError: if ``strict``, where some are neither at hand nor Hub ids.
    """
    found: dict[str, Any] = {}
    missing, options = [], []
    for field in INPUTS:
        names = settings.get(field)
        if not names:
            continue
        several = names if isinstance(names, list) else [names]
        paths = [hub.find_named(str(name), output) for name in several]
        lost = [
            f"{field} {name}"
            for name, path in zip(several, paths, strict=True)
            if not hub.may_exist(split_weight(path)[0])
        ]
        if lost:
            missing += lost
            options += [f"--{field} DIR"] * len(several)  # on the command line, they replace all of the recipe's
        found[field] = paths if isinstance(names, list) else paths[0]
    if strict and missing:
        raise RecipeError(
            f"{listed(missing)}: not found from here or next to {output}. The recipe of a finished model holds no absolute "
            f"paths: add {' '.join(options)}"
        )
    return found


def names_for_against(recipe: Recipe, output: Path) -> list[str]:
    """Base and adapter for ``qmerge verify --against``, where the names in a finished folder do not lead to the inputs from here;
    else none.

    Args:
        recipe: of the merge, with the names that were given for it.
        output: the finished folder.
    """
    adapters = recipe.adapter_references
    names = [recipe.base, *adapters, *([recipe.original] if recipe.original else [])]
    # --against takes one adapter.
    if len(adapters) > 1 or all(hub.is_found_again(name, output) for name in names):
        return []
    return [_at_revision(recipe.base, recipe.revision), _at_revision(adapters[0], recipe.adapter_revision)]


def _at_revision(name: str, revision: str | None) -> str:
    """A Hub id with its revision, as one name: ``--against`` forgets the recipe's revisions."""
    return f"{name}@{revision}" if revision and hub.HUB_ID.fullmatch(name) else name


class StrictLoader(PlainLoader):
    """A YAML loader that also refuses duplicate keys, of which PyYAML silently takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = []
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise RecipeError(f"recipe: duplicate key {key!r}: remove one of the two lines")
            keys.append(key)
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a YAML file.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or is not a mapping from names to values.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise RecipeError(f"{path}: expected a regular file")
        if path.stat().st_size > LARGEST_YAML:
            raise RecipeError(f"{path}: larger than a recipe can be ({LARGEST_YAML >> 20} MiB)")
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=StrictLoader)  # a SafeLoader: no code is run
    except OSError as cause:
        raise RecipeError(f"{path}: cannot be read: {cause.strerror}") from cause
    except AliasError as cause:
        raise RecipeError("recipe: YAML aliases (*name) are not allowed: write the value out") from cause
    except UNREADABLE as cause:  # also of a date or a number that does not exist
        raise RecipeError(f"{path}: not valid YAML: {' '.join(str(cause).split())}") from cause
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise RecipeError(f"{path}: expected lines like `target: nf4`")
    return settings
