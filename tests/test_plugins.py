"""The contract of every plug-in. A new file is tested without a change to this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qmerge import plugins
from qmerge.adapters import all_kinds, get_kind
from qmerge.adapters.base import AdapterKind
from qmerge.combine import get_method
from qmerge.combine.base import CombineMethod
from qmerge.errors import RecipeError
from qmerge.formats import all_targets, get_format, get_target
from qmerge.formats.base import Format, TargetFormat
from qmerge.grids import DOWN, UP
from qmerge.metrics import get_metric
from qmerge.metrics.base import Metric
from qmerge.rounding import get_rounding
from qmerge.rounding.base import Rounding, RoundingContext
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Options, Rows

from .formats.test_grids import gaussian, grid_for
from .parity import bnb as parity

EVERY = [(kind, name) for kind in plugins.KINDS for name in plugins.names(kind)]
FORMATS = plugins.names("formats")
TARGETS = list(all_targets())
SHAPES = [(1, 64), (16, 64), (24, 96), (7, 160), (64, 33), (128, 2), (32, 128), (160, 192), (256, 384)]


def options_for(name: str, shape: tuple[int, int]) -> Options:
    """The format's defaults for a model that has this weight."""
    target = get_target(name)
    return target.options(target.options_for_model({}, [shape]), None, "BF16")


def takes(name: str, shape: tuple[int, int]) -> bool:
    try:
        get_target(name).check("layer.weight", shape, options_for(name, shape))
    except RecipeError:
        return False
    return get_target(name).accepts(shape)


WRITTEN = [(name, shape) for name in TARGETS for shape in SHAPES if takes(name, shape)]


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_help_line(kind: str, name: str) -> None:
    """The first line of its docstring: one sentence that fits on a line."""
    line = plugins.help_line(kind, name)
    assert 10 < len(line) <= 120 and not line.startswith(" ")
    assert line[-1] in ".)" or kind == "metrics", line


@pytest.mark.parametrize("name", FORMATS)
def test_format(name: str) -> None:
    plugin = get_format(name)
    assert isinstance(plugin, Format)
    assert plugin.name == name
    assert not (plugin.info.is_quantized and plugin.info.is_dense), "dense and quantized at once"
    assert plugin.info.loaders or not isinstance(plugin, TargetFormat), "who reads it?"
    assert plugin.find({}, Reader()) == []


@pytest.mark.parametrize("name", plugins.names("adapters"))
def test_adapter(name: str) -> None:
    kind = get_kind(name)
    assert isinstance(kind, AdapterKind)
    assert kind.peft_types and all(peft_type == peft_type.upper() for peft_type in (*kind.peft_types, *kind.refused))


def test_no_two_adapter_kinds_take_the_same_peft_type() -> None:
    taken = [peft_type for kind in all_kinds().values() for peft_type in (*kind.peft_types, *kind.refused)]
    assert len(taken) == len(set(taken))


@pytest.mark.parametrize("name", plugins.names("rounding"))
def test_rounding(name: str) -> None:
    rounding = get_rounding(name)
    assert isinstance(rounding, Rounding)
    values_OI = gaussian()
    before_OI = values_OI.clone()
    for target in TARGETS:
        grid = grid_for(target, values_OI)
        codes_OI = rounding.choose(values_OI, grid, RoundingContext(name="layer.weight", rows=Rows(0, len(values_OI))))
        assert codes_OI.dtype == grid.nearest(values_OI).dtype and codes_OI.shape == values_OI.shape
    assert torch.equal(values_OI, before_OI), "the values were changed in place"


@pytest.mark.parametrize("name", plugins.names("combine"))
def test_combine(name: str) -> None:
    method = get_method(name)
    assert isinstance(method, CombineMethod) and isinstance(method.rowwise, bool)


@pytest.mark.parametrize("name", plugins.names("metrics"))
def test_metric(name: str) -> None:
    assert isinstance(get_metric(name), Metric)
    assert plugins.help_line("metrics", name).startswith(name), "the help line begins with the metric's name"


# --- a format reads what it writes -----------------------------------------------------------------------------------


def test_every_target_takes_some_shape() -> None:
    """Formats of stacks take no matrix: tests/parity/test_experts.py writes them."""
    assert {name for name, _ in WRITTEN} == {name for name in TARGETS if not get_target(name).info.takes_stacks}


IN_SAFETENSORS = [(name, shape) for name, shape in WRITTEN if get_target(name).info.container is None]


@pytest.mark.parametrize(("name", "shape"), IN_SAFETENSORS, ids=str)
def test_written_weights_are_read_back(name: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Fresh grid → codes → parts → file → weight: the same values, codes and options."""
    target = get_target(name)
    values_OI, options = gaussian(1, shape), options_for(name, shape)
    grid = target.grid(target.scales(values_OI, options), shape, options)
    codes_OI = grid.nearest(values_OI)
    path = parity.saved(parity.fresh(values_OI, name, options), tmp_path)
    with Reader() as reader:
        weight, stored = parity.opened(path, name, reader, options)
        assert (weight.name, weight.shape, weight.format) == (f"{parity.MODULE}.weight", shape, name)
        assert weight.options == options and target.same_grid(weight.options, options)
        assert parity.same(stored.values(Rows(0, shape[0])), grid.decode(codes_OI))
        assert torch.equal(stored.grid.decode(stored.codes(Rows(0, shape[0]))), grid.decode(codes_OI))
        for rows in parity.row_blocks(name, shape, options):
            part_OI = stored.grid.rows(rows).decode(stored.codes(rows))
            assert torch.equal(part_OI, grid.decode(codes_OI)[rows.start : rows.stop])


@pytest.mark.parametrize(("name", "shape"), WRITTEN, ids=str)
def test_outputs_announce_what_is_written(name: str, shape: tuple[int, int]) -> None:
    """Names, dtypes and shapes are planned before the work: the work must keep to them."""
    target, options = get_target(name), options_for(name, shape)
    specs = target.outputs("weight", shape, options)
    written = parity.fresh(gaussian(1, shape), name, options)
    assert written.keys() == specs.keys()
    for local, tensor in written.items():
        assert specs[local].shape in (tuple(tensor.shape), (-1,)), local
        assert specs[local].nbytes == tensor.nbytes or specs[local].shape == (-1,), local


@pytest.mark.parametrize("name", TARGETS)
def test_grid(name: str) -> None:
    """The operations that every rounding relies on."""
    values_OI = gaussian()
    grid = grid_for(name, values_OI)
    codes_OI = grid.nearest(values_OI)
    level_OI = grid.decode(codes_OI)
    assert level_OI.dtype == torch.float32 and level_OI.shape == values_OI.shape
    assert torch.equal(grid.decode(grid.nearest(level_OI)), level_OI), "a level is its own nearest"
    assert bool((grid.decode(grid.step(codes_OI, UP)) >= level_OI).all())
    assert bool((grid.decode(grid.step(codes_OI, DOWN)) <= level_OI).all())
    assert bool((grid.gap(codes_OI, values_OI) > 0).all())
    low, high = grid.ends()
    assert bool((low <= level_OI).all()) and bool((level_OI <= high).all())


def test_unknown_names_are_refused_with_a_guess() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'nf4'"):
        plugins.load("formats", "nf5")


def test_helpers_are_no_plugins() -> None:
    assert not [name for kind in plugins.KINDS for name in plugins.names(kind) if name.startswith("_")]
