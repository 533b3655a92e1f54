"""The contract of plug-ins, held against every one that is there: a new file is found and tested by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmerge import plugins
from qmerge.checkpoint.reader import Reader
from qmerge.checkpoint.scan import find_weights
from qmerge.checkpoint.writer import Layout, ShardWriter
from qmerge.errors import RecipeError
from qmerge.formats._base import Format
from qmerge.metrics._totals import added, plain
from qmerge.rounding._context import Context
from qmerge.types import Comparison, Rows

from .models import lora_update

EVERY = [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]
TARGETS = [name for name in plugins.names("formats") if plugins.load("formats", name).FORMAT.is_target]
SHAPE = (48, 80)


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_help_is_one_line(kind: str, name: str) -> None:
    line = plugins.help_line(kind, name)
    assert line.endswith(".") and 20 < len(line) < 130


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_has_what_its_kind_needs(kind: str, name: str) -> None:
    needed = {
        "formats": ["FORMAT"],
        "adapters": ["PEFT_TYPES", "updates"],
        "rounding": ["choose"],
        "metrics": ["sums", "value"],
    }[kind]
    module = plugins.load(kind, name)
    assert [attribute for attribute in needed if not hasattr(module, attribute)] == []


def test_unknown_plugin_says_what_was_meant() -> None:
    with pytest.raises(RecipeError, match=r"no format is called 'nf5'\. Did you mean 'nf4'\?"):
        plugins.load("formats", "nf5")


@pytest.mark.parametrize("name", plugins.names("formats"))
def test_format_is_named_as_its_file(name: str) -> None:
    assert plugins.load("formats", name).FORMAT.name == name


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_written_is_read_back(name: str, tmp_path: Path) -> None:
    """values → fresh grid → codes → file → weights found by their marks → the same values and codes."""
    form: Format = plugins.load("formats", name).FORMAT
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    options = form.options({}, None, "BF16")
    grid = form.grid(form.scales(values, options), SHAPE, options)
    codes = grid.nearest(values)
    specs = {f"m.{local}": spec for local, spec in form.outputs("weight", SHAPE, options).items()}
    writer = ShardWriter(tmp_path / "model.safetensors", Layout.of(specs))
    sink = writer.step(tuple(specs))
    sink.append("m.weight", form.pack(codes, options))
    for local, part in form.companions(grid, "weight", SHAPE, options).items():
        sink.append(f"m.{local}", part)
    sink.finish()
    writer.add_texts(sink.texts)
    writer.finish()
    writer.publish()
    with Reader() as reader:
        weight = find_weights(_headers(tmp_path / "model.safetensors"), reader)["m.weight"]
        assert (weight.format, weight.shape) == (name, SHAPE)
        stored = form.open(weight, reader, torch.device("cpu"))
        assert torch.equal(stored.values(Rows(0, 48)), grid.decode(codes))
        assert torch.equal(stored.values(Rows(16, 32)), grid.decode(codes)[16:32])
        assert torch.equal(stored.grid.decode(stored.codes(Rows(0, 48))), grid.decode(codes))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", plugins.names("rounding"))
def test_rounding_chooses_a_neighbour_on_every_grid(name: str, target: str) -> None:
    form: Format = plugins.load("formats", target).FORMAT
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(4))
    options = form.options({}, None, "BF16")
    grid = form.grid(form.scales(values, options), SHAPE, options)
    codes = plugins.load("rounding", name).choose(values, grid, Context("m.weight", Rows(0, 48)))
    nearest = grid.nearest(values)
    between = (grid.decode(codes) == grid.decode(nearest)) | (
        (grid.decode(codes) - values) * (grid.decode(nearest) - values) <= 0
    )
    assert bool(between.all())
    assert torch.equal(
        grid.decode(
            plugins.load("rounding", name).choose(grid.decode(codes), grid, Context("m", Rows(0, 48), 1, codes))
        ),
        grid.decode(codes),
    ), "values on the grid stay where they are"


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_metric_adds_up_over_row_blocks(name: str) -> None:
    """Sums over blocks are the sums over the whole weight (sampled metrics agree within their sampling error)."""
    metric = plugins.load("metrics", name)
    whole = metric.value(plain({name: metric.sums(_comparison(Rows(0, 48)))})[name])
    total = None
    for rows in (Rows(0, 16), Rows(16, 32), Rows(32, 48)):
        total = added(total, {name: dict(metric.sums(_comparison(rows)))})
    assert total is not None
    assert metric.value(plain(total)[name]) == pytest.approx(whole, rel=1e-4)


def _comparison(rows: Rows) -> Comparison:
    form: Format = plugins.load("formats", "nf4").FORMAT
    base = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5))
    options = form.options({}, None, "BF16")
    grid = form.grid(form.scales(base, options), SHAPE, options)
    update = lora_update(SHAPE, rank=4, size=0.1)
    codes = grid.nearest(base)
    base = grid.decode(codes)
    merged = update.apply(base, Rows(0, 48))
    new = grid.nearest(merged)
    part = slice(rows.start, rows.stop)
    return Comparison(
        base[part], merged[part], grid.decode(new)[part], codes[part], new[part], grid.rows(rows), rows, update
    )


def _headers(path: Path) -> dict:  # type: ignore[type-arg]
    from qmerge.checkpoint.header import read_header
    from qmerge.errors import CheckpointError

    return read_header(path, CheckpointError)[0]
