"""What the user asked for: one pydantic model, from the command line, from YAML, or from Python.

This is the only place with defaults. Everything that changes a number is a field, and the recipe is stored with the output.

choices      values that settings take
values       sizes, weights and revisions in texts
fields       one field for each setting
consistency  settings that do not go together
recipe       the checked settings, and what others may see of them
files        recipes in YAML
"""

from qmerge.recipe.choices import (
    AS_STORED,
    AUTO_BASE,
    CHAIN,
    CHAIN_HELP,
    DEFAULT_TARGET,
    JUDGED_TOKENS,
    MOST_TOKENS,
    OPTIONS,
    PATHS,
    RAY,
    TRAINED_ON,
    Device,
    EffortName,
    MergeOnto,
    Scales,
    TrainedOn,
)
from qmerge.recipe.files import find_inputs, names_for_against, read_recipe
from qmerge.recipe.recipe import Recipe, make_recipe
from qmerge.recipe.values import parse_size

__all__ = [
    "AS_STORED",
    "AUTO_BASE",
    "CHAIN",
    "CHAIN_HELP",
    "DEFAULT_TARGET",
    "JUDGED_TOKENS",
    "MOST_TOKENS",
    "OPTIONS",
    "PATHS",
    "RAY",
    "TRAINED_ON",
    "Device",
    "EffortName",
    "MergeOnto",
    "Recipe",
    "Scales",
    "TrainedOn",
    "find_inputs",
    "make_recipe",
    "names_for_against",
    "parse_size",
    "read_recipe",
]
