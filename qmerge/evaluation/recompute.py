"""Weights of a finished folder, computed again from its base, adapters and recipe, and compared byte for byte.

Weights that ``preserve`` rounded are left to their hashes: some of their codes depend on the calibration text, on the layers
before them, on the size of row blocks and on the number of threads.
"""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from qmerge import hub
from qmerge.errors import CheckpointError, QmergeError, listed
from qmerge.evaluation.inputs import inputs_of_folder, located_recipe
from qmerge.forecast.roundings import with_roundings
from qmerge.formats import get_target
from qmerge.pipeline import run_step
from qmerge.planning.plan import Plan, Shard, make_run_context, plan_from
from qmerge.recipe import Recipe
from qmerge.report.environment import device_name, installed_versions
from qmerge.report.make import IDENTITY_PACKAGES
from qmerge.report.result import LeftOut
from qmerge.safetensors_io.disk import read_range
from qmerge.safetensors_io.header import read_header
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import FileLayout, TensorSink, tensor_bytes
from qmerge.schema import ReportData
from qmerge.types import Step
from qmerge.weights.context import RunContext
from qmerge.wording import counted

SEED = 0
"""Chooses the weights where only some are computed again."""


def check_against_inputs(folder: Path, report: ReportData, *, every: bool) -> str:
    """Compute weights again and compare their bytes with those in the files.

    Args:
        every: all weights; else one of each file, chosen at random, and none where the inputs are not at hand.

    Returns:
        One line with the result; ``LeftOut`` where nothing was computed.

    Raises:
        CheckpointError: a weight has other bytes; if ``every``, also where none can be computed again.
    """
    with Reader() as reader:
        try:
            plan, context = _planned(folder, report, reader, may_download=every)
        except QmergeError as error:
            if every:  # it was asked for, so that not doing it is a fault
                raise CheckpointError(str(error)) from error
            return LeftOut(f"left out: {error}")
        chosen = {shard.file: _chosen(shard, report, every=every) for shard in plan.shards}
        different = []
        for shard in plan.shards:
            different += _different_weights(folder, shard, chosen[shard.file], context)
    names = [step.name for steps in chosen.values() for step in steps]
    if different:
        raise CheckpointError(
            f"{listed(different)}: computed again from base, adapter and recipe, {counted(len(different), 'weight')} of "
            f"{len(names)} have other bytes than the file"
        )
    return _result(names, plan, report, every=every)


def _chosen(shard: Shard, report: ReportData, *, every: bool) -> list[Step]:
    """The weights of a file to compute again."""
    steps = [step for step in shard.steps if _can_be_recomputed(step, report)]
    if every or not steps:
        return steps
    # A merged weight says more than one that was copied.
    merged = [step for step in steps if step.action == "merge"]
    # Each file has its own seed, so that its weight does not depend on how many files there are.
    return [random.Random(f"{SEED} {shard.file}").choice(merged or steps)]


def _result(names: list[str], plan: Plan, report: ReportData, *, every: bool) -> str:
    preserved = sum(not _can_be_recomputed(step, report) for step in plan.steps)
    if not names:
        return LeftOut("left out: preserve rounded all weights, so only their hashes are compared")
    found = f"computed again, same bytes: {listed(names)} (1 of each file, seed {SEED})"
    if every:
        found = f"{len(names)} of {len(plan.steps)} weights computed again, same bytes"
    return (
        f"{found}; of {preserved} that preserve may have rounded, only the hashes are compared" if preserved else found
    )


def _planned(folder: Path, report: ReportData, reader: Reader, *, may_download: bool) -> tuple[Plan, RunContext]:
    """The plan that the folder was made by.

    Raises:
        QmergeError: the inputs are not at hand, are others, or this machine computes other last bits.
    """
    # The recipe may say "auto", which could mean another device here than where the model was made.
    recipe = located_recipe(report, folder, device="cpu" if report.device == platform.machine() else "auto")
    if not may_download:
        _check_at_hand(recipe)
    # Cheap checks first: hashing the base takes as long as reading it.
    _check_versions(report)
    inputs = inputs_of_folder(recipe, report, reader, hashed=True)
    plan = plan_from(recipe, inputs, frozenset(report.promoted))
    context = make_run_context(plan, reader)
    if device_name(context.device) != report.device:
        raise CheckpointError(
            f"the weights were computed on {report.device}, and {device_name(context.device)} computes other last bits"
        )
    # auto chose by a forecast, which need not be made again: the report names every choice.
    rounding_of = {record.module: record.rounding for record in report.weights}
    return with_roundings(
        plan, {step.name: rounding_of.get(step.label, step.rounding) for step in plan.merged}
    ), context


def _check_at_hand(recipe: Recipe) -> None:
    """Raise CheckpointError for an input that would have to be downloaded."""
    names = {recipe.base: recipe.revision}
    names |= {name.partition("#")[0]: recipe.adapter_revision for name, _ in recipe.adapters}
    if recipe.original:
        names[recipe.original] = recipe.original_revision
    for name, revision in names.items():
        if not Path(name).expanduser().exists() and hub.find_local(name, revision) is None:
            raise CheckpointError(f"{name} is not at hand")


def _check_versions(report: ReportData) -> None:
    """Raise CheckpointError where another version of a library may compute other last bits."""
    others = []
    for name, installed in installed_versions(*IDENTITY_PACKAGES).items():
        if report.versions.get(name) != installed:
            others.append(f"{name} {report.versions.get(name)}, not {installed}")
    if others:
        raise CheckpointError(f"the weights were computed with {listed(others)}, which may give other last bits")


def _can_be_recomputed(step: Step, report: ReportData) -> bool:
    """Whether the bytes of a weight depend on base, adapter and recipe alone."""
    if step.rounding == "preserve":
        return False
    # The report says how merged weights were rounded. auto may have taken preserve for quantized ones without an update, too.
    is_requantized = step.action == "convert" and not get_target(step.target).info.is_dense
    return not (is_requantized and "preserve" in report.rounding)


def _different_weights(folder: Path, shard: Shard, steps: Sequence[Step], context: RunContext) -> list[str]:
    """Names of the weights that have other bytes in the file than when they are computed again."""
    path = folder / shard.file
    # Positions come from the plan: a file with another header differs in all its weights.
    texts = _texts(path, shard.layout, context.reader)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        different = []
        for step in steps:
            sink = ComparingSink(descriptor, shard.layout, texts)
            run_step(step, sink, context)
            if not sink.is_same(step.outputs):
                different.append(step.name)
        return different
    finally:
        os.close(descriptor)


def _texts(path: Path, layout: FileLayout, reader: Reader) -> dict[str, bytes]:
    """The tensors of a file whose size was known only at the end."""
    if not layout.texts:
        return {}
    tensors, _ = read_header(path, CheckpointError)
    return {name: bytes(reader.bytes(tensors[name], 0, tensors[name].nbytes)) for name in layout.texts}


class ComparingSink(TensorSink):
    """Compares what a step writes with the bytes of a finished file, and keeps nothing.

    Args:
        descriptor: of the file.
        layout: where its tensors are.
        texts: name → content of the tensors whose size was known only at the end.
    """

    def __init__(self, descriptor: int, layout: FileLayout, texts: Mapping[str, bytes]) -> None:
        self._descriptor = descriptor
        self._layout = layout
        self._texts = texts
        self._compared: dict[str, int] = {}
        self._differs = False

    def append(self, name: str, tensor: Tensor) -> None:
        self.append_bytes(name, tensor_bytes(tensor))

    def append_bytes(self, name: str, data: memoryview | bytearray) -> None:
        start = self._compared.get(name, 0)
        self._compared[name] = start + len(data)
        if name in self._texts:
            self._differs |= self._texts[name][start : start + len(data)] != bytes(data)
            return
        position = self._layout.data_start + self._layout.tensors[name].offset + start
        self._differs |= read_range(self._descriptor, position, len(data)) != bytes(data)

    def is_same(self, names: Mapping[str, object]) -> bool:
        """Whether all bytes of these tensors were written, and are those of the file."""
        # A step that writes too little has not been compared to the end.
        for name in names:
            expected = len(self._texts[name]) if name in self._texts else self._layout.tensors[name].spec.nbytes
            self._differs |= self._compared.get(name, 0) != expected
        return not self._differs
