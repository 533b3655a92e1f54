"""Shape of a module's weight, as far as the adapter's tensors show it, for every PEFT type: (O, I), -1 where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor

Parts: TypeAlias = Mapping[str, Tensor]
"""Name within the module (``hada_w1_a``, ``oft_R.weight``) → tensor."""

Shape: TypeAlias = tuple[int, int]
ShapeRule: TypeAlias = Callable[[Parts, Mapping[str, Any]], Shape]
"""(parts of a module, adapter_config.json) → (O, I) of its weight, -1 where they do not show it. A part that is missing or has
another number of axes raises KeyError, IndexError, ValueError or StopIteration."""

UNKNOWN: Shape = (-1, -1)


def axis_length(parts: Parts, name: str, axis: int) -> int:
    """Length of an axis of a part; -1 if the module has no such part."""
    return parts[name].shape[axis] if name in parts else -1


def by_axes(out: str, axis_O: int, into: str, axis_I: int) -> ShapeRule:
    """Rule: O is the length of an axis of the part ``out``, I of the part ``into``. A name of "" means unknown."""

    def rule(parts: Parts, config: Mapping[str, Any]) -> Shape:
        return axis_length(parts, out, axis_O), axis_length(parts, into, axis_I)

    return rule


def unknown(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """The tensors do not show the shape."""
    return UNKNOWN


def of_lokr(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """The Kronecker product of two matrices w1 and w2, each whole or a product a · b."""
    if "lokr_t2" in parts:  # a convolution
        return UNKNOWN
    rows = 1
    columns = 1
    for factor in ("lokr_w1", "lokr_w2"):
        left = parts.get(f"{factor}_a", parts.get(factor))
        right = parts.get(f"{factor}_b", parts.get(factor))
        if left is not None:
            rows *= left.shape[0]
        if right is not None:
            columns *= math.prod(right.shape[1:])  # with the kernel of a convolution
    return rows, columns


def of_oft(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """R holds the entries above the diagonal of one skew-symmetric block per row: n (n − 1) / 2 for a block of size n."""
    if "oft_embedding_R.weight" in parts:
        return UNKNOWN
    blocks, entries = parts["oft_R.weight"].shape
    if config.get("block_share"):
        return UNKNOWN
    # n (n − 1) / 2 = entries, solved for n.
    block_size = round((1 + math.sqrt(1 + 8 * entries)) / 2)
    return -1, blocks * block_size


def of_ia3(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """[O, 1] scales rows, [1, I] columns; in a convolution, [1, channels, 1…] scales either."""
    if parts["ia3_l"].ndim > 2:
        return UNKNOWN
    rows, columns = parts["ia3_l"].shape
    return (rows, -1) if columns == 1 else (-1, columns)


def of_road(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """One, two or four parameters per pair of out features (arXiv 2409.00119, table 1)."""
    parameters_per_pair = {"road_1": 1, "road_2": 2, "road_4": 4}.get(config.get("variant", "road_1"))
    if not parameters_per_pair:
        return UNKNOWN
    return parts["road_theta"].numel() * 2 // parameters_per_pair, -1


def of_vblora(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """Logits for every sub-vector of A and B."""
    length = int(config.get("vector_length") or 0)
    A = _first_with_prefix(parts, "vblora_logits_A")
    B = _first_with_prefix(parts, "vblora_logits_B")
    if A is None or B is None or not length:
        return UNKNOWN
    return B.shape[0] * length, A.shape[1] * length


def of_hira(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """A linear layer or convolution, with A as [rank, in, kernel…], or an embedding [tokens, features]."""
    if "hira_embedding_A" in parts:
        return axis_length(parts, "hira_embedding_A", 1), axis_length(parts, "hira_embedding_B", 0)
    A = parts.get("hira_A")
    return axis_length(parts, "hira_B", 0), -1 if A is None else math.prod(A.shape[1:])


def of_boft(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """R is [factors, blocks, block, block], s scales the out features."""
    _, blocks, size, _ = parts["boft_R"].shape
    return parts["boft_s"].numel(), blocks * size


def of_c3a(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """One circulant block for every pair of blocks of out and in features."""
    blocks_O, blocks_I, size = parts["c3a_kernel"].shape
    return blocks_O * size, blocks_I * size


def of_glora(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """C has one row per in feature in each of its forms, and A one per out feature where it is a product."""
    C = _first_with_prefix(parts, "glora_C.")
    if C is None:
        raise KeyError("glora_C")
    return axis_length(parts, "glora_A.Xd", 0), C.shape[0]


def of_gralora(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """A is [blocks, in of a block, rank], B is [blocks, rank, out of a block]."""
    A = parts["gralora_A"]
    B = parts["gralora_B"]
    return B.shape[0] * B.shape[2], A.shape[0] * A.shape[1]


def of_loha(parts: Parts, config: Mapping[str, Any]) -> Shape:
    """A Hadamard product of two products; of two Tucker decompositions in a convolution."""
    if "hada_t1" in parts:
        return axis_length(parts, "hada_w1_a", 1), -1
    return axis_length(parts, "hada_w1_a", 0), axis_length(parts, "hada_w1_b", 1)


def _first_with_prefix(parts: Parts, prefix: str) -> Tensor | None:
    for name, tensor in parts.items():
        if name.startswith(prefix):
            return tensor
    return None
