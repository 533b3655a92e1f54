"""YAML from outside. (Importing this does not import torch.)"""

from __future__ import annotations

from typing import Any

import yaml


class AliasError(yaml.YAMLError):
    """A value by reference (``*name``)."""


class PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases, of which a few lines make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise AliasError("an alias")
        return super().compose_node(parent, index)


def plain_mapping(text: str, most: int) -> dict[Any, Any]:
    """A YAML mapping as a dict; empty where the text is anything else, uses aliases, or is longer than ``most`` characters."""
    if len(text) > most:
        return {}
    try:
        content = yaml.load(text, Loader=PlainLoader)  # a SafeLoader: no code is run
    except (ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
