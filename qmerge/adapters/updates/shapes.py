"""What the tensors of one module show of its weight's shape, for every PEFT type: (O, I), -1 where they do not."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Parts = Mapping[str, Tensor]
"""Name within the module (``hada_w1_a``, ``oft_R.weight``) → tensor."""

UNKNOWN = (-1, -1)


def by(out: str, axis_O: int, into: str, axis_I: int) -> Callable[[Parts, Mapping[str, Any]], tuple[int, int]]:
    """Read out and in features off the axes of two tensors; "" for what they do not show."""
    return lambda parts, config: (
        parts[out].shape[axis_O] if out in parts else -1,
        parts[into].shape[axis_I] if into in parts else -1,
    )


def of_lokr(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """The Kronecker product of two matrices, each whole or a product of two."""
    if "lokr_t2" in parts:
        return UNKNOWN
    lefts = [parts.get(f"{w}_a", parts.get(w)) for w in ("lokr_w1", "lokr_w2")]
    rights = [parts.get(f"{w}_b", parts.get(w)) for w in ("lokr_w1", "lokr_w2")]
    rows, columns = [t.shape[0] for t in lefts if t is not None], [t.shape[1] for t in rights if t is not None]
    return math.prod(rows), math.prod(columns)


def of_oft(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """R holds the entries above the diagonal of one skew-symmetric block per row."""
    if "oft_embedding_R.weight" in parts:
        return UNKNOWN
    blocks, entries = parts["oft_R.weight"].shape
    return -1, -1 if config.get("block_share") else blocks * round((1 + math.sqrt(1 + 8 * entries)) / 2)


def of_ia3(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """[O, 1] scales rows, [1, I] columns."""
    rows, columns = parts["ia3_l"].shape
    return (rows, -1) if columns == 1 else (-1, columns)


def of_road(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """Parameters per pair of out features: one, two or four (arXiv 2409.00119, table 1)."""
    per_pair = {"road_1": 1, "road_2": 2, "road_4": 4}.get(config.get("variant", "road_1"))
    return (parts["road_theta"].numel() * 2 // per_pair if per_pair else -1), -1


def of_vblora(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """Logits for every sub-vector of A and B."""
    length = int(config.get("vector_length") or 0)
    A, B = (next((t for name, t in parts.items() if name.startswith(f"vblora_logits_{x}")), None) for x in "AB")
    return UNKNOWN if A is None or B is None or not length else (B.shape[0] * length, A.shape[1] * length)


def of_hira(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """A layer, or an embedding [tokens, features]."""
    embedding = "hira_embedding_A" in parts
    rule = by("hira_embedding_A", 1, "hira_embedding_B", 0) if embedding else by("hira_B", 0, "hira_A", 1)
    return rule(parts, config)


def of_boft(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """R is [factors, blocks, block, block], s scales the out features."""
    _, blocks, size, _ = parts["boft_R"].shape
    return parts["boft_s"].shape[0], blocks * size


def of_c3a(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """One circulant block for every pair of blocks of out and in features."""
    blocks_O, blocks_I, size = parts["c3a_kernel"].shape
    return blocks_O * size, blocks_I * size


def of_glora(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """C has one row per in feature in each of its forms, and A one per out feature in that of a product."""
    C = next(tensor for name, tensor in parts.items() if name.startswith("glora_C."))
    return by("glora_A.Xd", 0, "", 0)(parts, config)[0], C.shape[0]


def of_gralora(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """A is [blocks, in of a block, rank], B [blocks, rank, out of a block]."""
    A, B = parts["gralora_A"], parts["gralora_B"]
    return B.shape[0] * B.shape[2], A.shape[0] * A.shape[1]


def of_loha(parts: Parts, config: Mapping[str, Any]) -> tuple[int, int]:
    """A Hadamard product of two products."""
    return UNKNOWN if "hada_t1" in parts else by("hada_w1_a", 0, "hada_w1_b", 1)(parts, config)
