"""What a merge reports while it works: what takes the time is counted, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

import qmerge.demo
from qmerge.patch import direct
from qmerge.progress import Progress
from qmerge.recipe import make_recipe

DEMO = Path(qmerge.demo.__file__).parent


class Recorder(Progress):
    """(what, bytes, label) of every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int, str]] = []

    def stage(self, label: str, total: int) -> None:
        self.calls.append(("stage", total, label))

    def advance(self, nbytes: int, label: str = "") -> None:
        self.calls.append(("advance", nbytes, label))


@pytest.mark.parametrize("rounding", ["preserve", "nearest"])
def test_copied_weights_count_only_where_nothing_takes_longer(rounding: str, tmp_path: Path) -> None:
    """Embeddings come first and are fast: the time left, counted with them, would begin far too short."""
    progress = Recorder()
    given = {"calibration": str(DEMO / "calibration.txt"), "calibration_tokens": 256, "sequence_length": 64}
    if rounding == "nearest":
        given = {}
    recipe = make_recipe(
        {
            "base": str(DEMO / "base-nf4"),
            "adapter": str(DEMO / "adapter"),
            "target": "nf4",
            "rounding": rounding,
            "out": str(tmp_path / "out"),
            **given,
        }
    )
    direct.merge(recipe, False, progress)
    begin = next(number for number, call in enumerate(progress.calls) if call[::2] == ("stage", "merging"))
    rest = progress.calls[begin + 1 :]
    calls = rest[: next((number for number, call in enumerate(rest) if call[0] == "stage"), len(rest))]
    assert sum(nbytes for _, nbytes, _ in calls) == progress.calls[begin][1] > 0, "it ends at 100 %"
    counted = {label for _, nbytes, label in calls if nbytes}
    assert ("model.embed_tokens.weight" in counted) == (rounding == "nearest")
    if rounding == "preserve":
        first_layer = next(number for number, call in enumerate(calls) if call[2].startswith("calibrating layer 1 "))
        assert not any(nbytes for _, nbytes, _ in calls[:first_layer])
