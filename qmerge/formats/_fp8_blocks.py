"""Which rows and columns of an FP8 weight share a scale, according to its config and the shape of its scale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from qmerge.errors import CheckpointError
from qmerge.types import TensorInfo

# Rows and columns that share a scale; None: all of them.
Block = tuple[int | None, int | None]

MATRIX: Block = (None, None)
ROW: Block = (1, None)
SQUARE = (128, 128)


def sizes_of(block: Block, shape: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a block in a weight of this shape."""
    rows, columns = shape
    return block[0] or max(1, rows), block[1] or max(1, columns)


def blocks_of(shape: tuple[int, int], block: Block) -> tuple[int, int]:
    """Number of blocks down and across; the last ones may be short."""
    height, width = sizes_of(block, shape)
    return -(-shape[0] // height), -(-shape[1] // width)


def describe_block(block: Block) -> str:
    """``matrix``, ``row`` or ``block of 128 x 128``."""
    if block == MATRIX:
        return "matrix"
    if block == ROW:
        return "row"
    return f"block of {block[0]} x {block[1]}"


def block_of(scale: TensorInfo, shape: tuple[int, int], quantization: Mapping[str, Any]) -> Block:
    """The block of a weight of this shape: of those that the config allows, the one with as many blocks as scales.

    Raises:
        CheckpointError: none has.
    """
    allowed = list(dict.fromkeys(_allowed_blocks(quantization)))
    for block in allowed:
        if scale.shape in _scale_shapes(shape, block):
            return block
    expected = " or ".join(f"{list(blocks_of(shape, b))} (a scale for every {describe_block(b)})" for b in allowed)
    raise CheckpointError(
        f"{scale.name} has shape {list(scale.shape)}, but the config asks for {expected or 'no FP8 scales'} of a weight of "
        f"{list(shape)}. Take the config.json that belongs to these files"
    )


def _scale_shapes(shape: tuple[int, int], block: Block) -> list[tuple[int, ...]]:
    """Shapes that the scale of a weight may have."""
    count = blocks_of(shape, block)
    # Axes of size 1 may be missing.
    if block == MATRIX:
        return [count, (), (1,)]
    if block == ROW:
        return [count, (count[0],)]
    return [count]


def _allowed_blocks(quantization: Mapping[str, Any]) -> Iterator[Block]:
    """The blocks that a config declares; all known ones if it declares none."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        yield from _blocks_of_schemes(quantization)
    elif method == "fp8" and quantization.get("weight_block_size") is not None:
        yield _parse_block(quantization["weight_block_size"])
    elif method == "fp8":
        yield from (MATRIX, ROW)  # vLLM's and transformers' configs without weight_block_size
    elif method == "fbgemm_fp8":
        yield ROW
    else:
        yield from (SQUARE, MATRIX, ROW)


def _blocks_of_schemes(quantization: Mapping[str, Any]) -> Iterator[Block]:
    """The blocks of compressed-tensors' ``config_groups``."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict):
        return
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights or {}
        strategy = weights.get("strategy")
        if strategy == "tensor":
            yield MATRIX
        elif strategy == "channel":
            yield ROW
        elif strategy == "block":
            yield _parse_block(weights.get("block_structure"))
        elif strategy == "group":
            yield _parse_block([1, weights.get("group_size")])


def _parse_block(declared: object) -> Block:
    """[128, 128]; old files of compressed-tensors have the text "128x128".

    Raises:
        CheckpointError: it is not two positive integers.
    """
    numbers = declared
    if isinstance(declared, str):
        numbers = [int(part) if part.isdigit() else 0 for part in declared.split("x")]
    if isinstance(numbers, list) and len(numbers) == 2:
        height, width = numbers
        if isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0:
            return height, width
    raise CheckpointError(
        f"quantization_config: blocks of {declared!r}; expected two positive integers, as [128, 128]. Take the config.json that "
        f"belongs to these files"
    )
