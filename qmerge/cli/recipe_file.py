"""The command that helps to write a recipe: all options as YAML, or the JSON schema with which an editor completes them."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
import yaml
from pydantic.fields import FieldInfo

from qmerge.cli.options import flag, known_values
from qmerge.recipe import Recipe

SCHEMA_ADDRESS = "https://raw.githubusercontent.com/qmerge/qmerge/main/docs/recipe.schema.json"

SCHEMA_LINE = f"# yaml-language-server: $schema={SCHEMA_ADDRESS}"
"""The first line of a recipe: editors with the YAML language server complete and check the file by it."""

TITLE = "# A recipe: qmerge run recipe.yaml. Options behind a # have their default value; take the # away to change it."

EXAMPLES = {
    "base": "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
    "adapter": "you/your-qlora-adapter",
    "target": "nf4",
    "out": "merged",
}
"""Fields that almost every recipe has; the others are commented out."""


def recipe_command(
    schema: Annotated[bool, flag("--schema", help="print the JSON schema of a recipe, for editors")] = False,
) -> None:
    """Print a recipe with all options and their defaults, to be edited."""
    if schema:
        typer.echo(json.dumps(json_schema(), indent=1, ensure_ascii=False))
    else:
        typer.echo(template(), nl=False)


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe. Editors offer the names of targets, roundings and the like, and accept others, because a
    name may be a file, or belong to a later version."""
    schema: dict[str, Any] = Recipe.model_json_schema()
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ADDRESS, **schema}
    for name, field in schema["properties"].items():
        names = known_values(name)
        if names and field.get("type") == "string" and "enum" not in field:
            del field["type"]
            field["anyOf"] = [{"enum": names}, {"type": "string"}]
    return schema


def template() -> str:
    """A recipe in YAML: every field with its help text above it."""
    lines = [SCHEMA_LINE, TITLE]
    for name, field in Recipe.model_fields.items():
        lines += ["", f"# {field.description}", _example(name, field)]
    return "\n".join(lines) + "\n"


def _example(name: str, field: FieldInfo) -> str:
    if name in EXAMPLES:
        return f"{name}: {EXAMPLES[name]}"
    if field.default is None:
        return f"# {name}:"
    return "# " + yaml.safe_dump({name: field.default}).strip()
