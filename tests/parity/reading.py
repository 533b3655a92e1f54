"""The values of a model as qmerge reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from qmerge.checkpoint.scan import scan
from qmerge.formats import get_format
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows


def read(folder: Path, block: int = 0, decoded: bool = False) -> dict[str, Tensor]:
    """Name → float32 values of every quantized weight.

    Args:
        block: rows that are read at a time; 0: all of them.
        decoded: the grid decodes the codes.
    """
    values = {}
    with Reader() as reader:
        for name, weight in scan(folder, reader).weights.items():
            fmt = get_format(weight.format)
            if not fmt.info.is_quantized:
                continue
            stored = fmt.open(weight, reader, torch.device("cpu"))
            size = block or weight.shape[0]
            parts = []
            for start in range(0, weight.shape[0], size):
                rows = Rows(start, min(start + size, weight.shape[0]))
                if decoded:
                    parts.append(stored.grid.rows(rows).decode(stored.codes(rows)))
                else:
                    parts.append(stored.values(rows))
            values[name] = torch.cat(parts).view(weight.shape)
    return values
