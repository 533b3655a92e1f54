"""YAML from outside. (Importing this does not import torch.)"""

from __future__ import annotations

from typing import Any

import yaml

UNREADABLE = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What PyYAML raises on text that is not YAML, and on values that their tags do not fit (``!!bool maybe``: a KeyError)."""


class AliasError(yaml.YAMLError):
    """A value by reference (``*name``)."""


class PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases, of which a few lines make gigabytes, and without numbers to base 60."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise AliasError("an alias")
        return super().compose_node(parent, index)


def _number(loader: PlainLoader, node: yaml.ScalarNode) -> Any:
    """An int or a float; a text where it has colons.

    YAML 1.1 reads 1:30 as 90, in a time that grows with the square of the length. YAML 1.2 reads a text.
    """
    text = loader.construct_scalar(node)
    if ":" in text:
        return text
    if node.tag == INT:
        return loader.construct_yaml_int(node)
    return loader.construct_yaml_float(node)


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
PlainLoader.add_constructor(INT, _number)
PlainLoader.add_constructor(FLOAT, _number)


def plain_mapping(text: str, most: int) -> dict[Any, Any]:
    """A YAML mapping as a dict; empty where the text is anything else, uses aliases, or is longer than ``most`` characters."""
    if len(text) > most:
        return {}
    try:
        content = yaml.load(text, Loader=PlainLoader)  # a SafeLoader: no code is run
    except UNREADABLE:
        return {}
    return content if isinstance(content, dict) else {}
