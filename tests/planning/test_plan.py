"""The work of planning grows with the number of weights, not with its square."""

from __future__ import annotations

from pathlib import Path

import pytest

from qmerge.planning.plan import make_plan
from qmerge.recipe import make_recipe
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Weight

from .. import models


def sizes_asked(layers: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often the size of a weight is asked for in one plan."""
    model = models.llama(num_hidden_layers=layers)
    models.save(model, folder / "base")
    models.adapter(model, folder / "adapter", target_modules=["q_proj"])
    asked = []
    nbytes = Weight.nbytes.fget
    assert nbytes is not None

    def counted(weight: Weight) -> int:
        asked.append(weight.name)
        return int(nbytes(weight))

    with monkeypatch.context() as patch, Reader() as reader:
        patch.setattr(Weight, "nbytes", property(counted))
        make_plan(
            make_recipe({"base": str(folder / "base"), "adapter": str(folder / "adapter"), "target": "bf16"}), reader
        )
    return len(asked)


def test_planning_is_linear_in_the_number_of_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = sizes_asked(3, tmp_path / "few", monkeypatch)
    many = sizes_asked(12, tmp_path / "many", monkeypatch)
    assert 0 < many < 5 * few
