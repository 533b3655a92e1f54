"""YAML from outside. (Importing this does not import torch.)"""

from __future__ import annotations

import yaml


class AliasError(yaml.YAMLError):
    """A value by reference (``*name``)."""


class PlainLoader(yaml.SafeLoader):
    """A YAML loader without aliases, of which a few lines make gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise AliasError("an alias")
        return super().compose_node(parent, index)
