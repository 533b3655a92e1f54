"""Where peft stores differences that are not LoRAs: whole modules (``modules_to_save``) and biases (``lora_bias``)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from qmerge.adapters.reading.folder import PREFIX
from qmerge.extract.adapter import LoraSpool
from qmerge.extract.difference import PairReader
from qmerge.extract.pairing import CheckpointPair, WeightPair
from qmerge.extract.result import LORA_BIAS, MODULES_TO_SAVE, Differences
from qmerge.formats import get_format

WITHOUT_LORA_BIAS = ("hqq", "torchao")
"""Formats for whose layers peft has no ``lora_bias`` (0.21: tuners/lora/hqq.py, torchao.py)."""


def how_savable(pair: WeightPair, checkpoints: CheckpointPair) -> str | None:
    """How peft can store this difference: MODULES_TO_SAVE, LORA_BIAS, or None."""
    if pair.module in checkpoints.modules.linear:
        can_save_bias = pair.local == "bias" and not _uses_formats(checkpoints, WITHOUT_LORA_BIAS)
        return LORA_BIAS if can_save_bias else None
    # peft copies the module of BASE and trains the copy, so it must be dense there and contain no other module.
    is_leaf = pair.module in checkpoints.modules.leaves
    members = checkpoints.weights_of(pair.module)
    is_dense = all(get_format(member.base.format).info.is_dense for member in members)
    return MODULES_TO_SAVE if is_leaf and is_dense else None


def _uses_formats(checkpoints: CheckpointPair, formats: Iterable[str]) -> bool:
    """Whether a linear layer of BASE is stored in one of these formats."""
    return any(pair.is_linear and pair.base.format in formats for pair in checkpoints.weights)


def whole_weights(saved_modules: Iterable[str], checkpoints: CheckpointPair) -> dict[str, WeightPair]:
    """Name in the adapter → every weight of the modules that are stored whole."""
    modules = checkpoints.modules
    whole = {}
    for module in saved_modules:
        for pair in checkpoints.weights_of(module):
            whole[PREFIX + pair.name] = pair
        if module == modules.input_embedding and modules.tied_weight:
            # peft stores a tied embedding under both names, and looks for both when it loads.
            whole[PREFIX + modules.tied_weight] = checkpoints.weights_of(module)[0]
    return whole


def add_biases(spool: LoraSpool, differing: Differences, checkpoints: CheckpointPair, reader: PairReader) -> bool:
    """Add the differences of biases that are stored as LORA_BIAS; returns whether there are any.

    peft expects a bias in every LoRA, so the other LoRAs get zeros. A layer in which only the bias differs gets factors of
    zeros.
    """
    changed = set(differing.modules_saved_as(LORA_BIAS))
    if not changed:
        return False
    adapted = differing.adapted_modules()
    biases = {pair.module: pair for pair in checkpoints.weights if pair.local == "bias"}
    for pair in checkpoints.weights:
        if not pair.is_linear or pair.module not in adapted | changed:
            continue
        outputs, inputs = pair.shape
        bias_O = torch.zeros(outputs)
        if pair.module in changed:
            # A vector is one block of one row.
            bias_O = next(reader.differences(biases[pair.module])).delta_OI[0]
        if pair.module not in adapted:
            spool.add_factors(pair.module, torch.zeros(1, inputs), torch.zeros(outputs, 1))
        spool.add_bias(pair.module, bias_O)
    return True


def needs_fan_in_fan_out(differing: Differences, checkpoints: CheckpointPair) -> bool:
    """peft's flag for Conv1D layers. Quantized ones do not count: bitsandbytes makes them ordinary linear layers."""
    adapted = {fit.name for fit in differing.fits}
    adapted_conv1d = [pair for pair in checkpoints.weights if pair.is_conv1d and pair.name in adapted]
    return any(get_format(pair.base.format).info.is_dense for pair in adapted_conv1d)
