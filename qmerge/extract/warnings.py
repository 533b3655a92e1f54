"""Warnings of an extraction, in plain English: about the result, and about the two checkpoints."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from qmerge.errors import listed
from qmerge.extract.decompose import factor_entries
from qmerge.extract.pairing import CheckpointPair
from qmerge.extract.result import ENOUGH_ENERGY, LORA_BIAS, Extraction, FitStatistics, OtherDifference, kept_share
from qmerge.formats import get_format
from qmerge.wording import percent

UNRELATED_SIZE = 0.5
"""‖delta‖ / ‖base‖ above this is a warning. Fine-tuning changes a few percent; two independent models of the same norm differ
by √2 = 141 %."""

MAY_DIFFER = (
    "_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "quantization_config", "transformers_version",
    "use_cache", "unsloth_version", "unsloth_fixed",
)  # fmt: skip
"""Keys of config.json that may differ: they do not change the results of a model, or are about how it is stored."""

MOST_NAMES = 5
"""Names in a warning; further ones are counted."""


def result_warnings(result: Extraction, save_modules: bool) -> Iterator[str]:
    """Warnings about the LoRAs and the lost differences, the worst first."""
    total = FitStatistics.of(result.fits)
    if total.relative_size is None:
        yield unrelated_warning("all")
    elif total.relative_size > UNRELATED_SIZE:
        yield unrelated_warning(percent(total.relative_size))
    if total.kept < ENOUGH_ENERGY:
        yield low_rank_warning(result, total)
    yield from other_warnings(result.others, save_modules)


def unrelated_warning(size: str) -> str:
    """BASE may be the wrong model."""
    return (
        f"MERGED − BASE is {size} of the weights. Fine-tuning changes at most a few percent, unrelated models differ by about "
        f"140 %. Is BASE the model that MERGED was made from?"
    )


def low_rank_warning(result: Extraction, total: FitStatistics) -> str:
    """The rank is too low to keep most of the difference, and which one would."""
    kept_by_group = {name: kept_share(fits) for name, fits in result.groups.items()}
    worst = min(kept_by_group, key=lambda name: kept_by_group[name])
    lowest, highest = total.ranks
    used = f"rank {highest}" if lowest == highest else f"rank {lowest} to {highest}"
    keeps = f"{percent(total.kept)} of the difference (worst: {worst}, {percent(kept_by_group[worst])})"
    advice = f"Use --rank {total.rank_90} to keep 90 %."
    if not total.rank_90_known:
        advice = f"90 % needs --rank {total.rank_90} or more."
    adapter_entries = 0
    weight_entries = 0
    for fit in result.fits:
        adapter_entries += factor_entries(fit.shape, total.rank_90)
        weight_entries += math.prod(fit.shape)
    if adapter_entries >= weight_entries:
        advice += " An adapter of that rank is as large as the weights: the difference is not of low rank; keep MERGED."
    return f"{used} keeps only {keeps}. {advice}"


def other_warnings(others: Iterable[OtherDifference], save_modules: bool) -> Iterator[str]:
    """Differences outside the weights of linear layers: those that are lost, and those that are hard to merge."""
    by_storage: dict[str | None, list[OtherDifference]] = defaultdict(list)
    for other in others:
        by_storage[other.saved].append(other)
    if by_storage[None]:
        yield lost_warning(by_storage[None], save_modules)
    biases = by_storage[LORA_BIAS]
    if biases:
        yield (
            f"{len(biases)} biases differ and are stored as lora_bias: the adapter works next to BASE, but peft and qmerge can "
            f"merge it only if every layer with a LoRA has a bias"
        )


def lost_warning(lost: Sequence[OtherDifference], save_modules: bool) -> str:
    """Differences that are not in the adapter, the largest of them, and the option that would store them."""
    # A weight that cannot be subtracted, or whose base is zero, has no size.
    sizes = [other.relative_size for other in lost if other.relative_size is not None]
    largest = f" by up to {percent(max(sizes))}" if sizes else ""
    names = listed([other.name for other in lost], MOST_NAMES)
    line = f"{len(lost)} weights outside linear layers differ{largest} and are not in the adapter: {names}."
    if not save_modules and any(other.savable for other in lost):
        line += " Use --save-modules to store them."
    return line


def checkpoint_warnings(checkpoints: CheckpointPair, result: Extraction) -> Iterator[str]:
    """Warnings about formats and configs that differ between MERGED and BASE."""
    formats = {(pair.merged.format, pair.base.format) for pair in checkpoints.weights if pair.is_linear}
    for merged_format, base_format in sorted(formats):
        rounded = [name for name in (merged_format, base_format) if get_format(name).info.is_quantized]
        # No reason to worry where the LoRAs keep nearly all of the difference.
        if rounded and merged_format != base_format and kept_share(result.fits) < ENOUGH_ENERGY:
            yield (
                f"MERGED is stored as {merged_format}, BASE as {base_format}: the difference also contains the rounding error of "
                f"{' and '.join(rounded)}, which no low rank keeps; if you can, use two checkpoints of the same format"
            )
    merged_config = checkpoints.merged.config
    base_config = checkpoints.base.config
    differing_keys = []
    for key in sorted(merged_config.keys() & base_config.keys()):
        if key not in MAY_DIFFER and merged_config[key] != base_config[key]:
            differing_keys.append(key)
    if differing_keys:
        yield (
            f"config.json differs in {listed(differing_keys, MOST_NAMES)}: an adapter cannot store settings, so it runs with "
            f"those of BASE"
        )
