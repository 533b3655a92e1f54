"""A LoRA in llama.cpp's own form, one GGUF file, as the folder that PEFT would have saved.

    blk.0.attn_q.weight.lora_a   [r, I]
    blk.0.attn_q.weight.lora_b   [O, r], rows in llama.cpp's order

llama.cpp scales by alpha / r, and by 1 where alpha is 0 (src/llama-adapter.h).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from qmerge.errors import AdapterError, listed
from qmerge.formats.gguf import BLOCK_TYPES, in_model_order
from qmerge.gguf.header import GgufHeader, read_header
from qmerge.gguf.mapping import Place
from qmerge.hub import ADAPTER_CONFIG
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.temporary import folder_until_exit

ALPHA, KIND = "adapter.lora.alpha", "adapter.type"

A, B = ".lora_a", ".lora_b"


def extracted_adapter(path: Path, places: Mapping[str, Place]) -> Path:
    """A PEFT folder with the adapter of a GGUF file. It is removed at exit.

    Args:
        places: where the weights of the base are in a GGUF file.

    Raises:
        AdapterError: the file is not a LoRA, or one for another model.
        CheckpointError: it is damaged.
    """
    header = read_header(path)
    if header.scalars.get(KIND) != "lora":
        raise AdapterError(f"{path.name}: expected a LoRA ({KIND} = lora), found {header.scalars.get(KIND)!r}")
    weight_of = {place.tensor: name for name, place in places.items()}
    modules = sorted({name.removesuffix(A).removesuffix(B) for name in header.tensors})
    unknown = [module for module in modules if not _is_matrix(module, header, weight_of)]
    if unknown:
        raise AdapterError(
            f"{path.name}: {listed(unknown)}: not a matrix of the base, or a stack of experts; was the adapter trained on this "
            f"model? PEFT's own folder has every other kind"
        )
    alpha = float(header.scalars.get(ALPHA, 0.0))
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module in modules:
        name = weight_of[module].removesuffix(".weight")
        tensors[f"base_model.model.{name}.lora_A.weight"] = _read(module + A, header)
        lora_b = in_model_order(_read(module + B, header), places[weight_of[module]].order)
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora_b.contiguous()
        ranks[name] = lora_b.shape[1]
    folder = folder_until_exit()
    rank = max(ranks.values())
    others = {name: own for name, own in ranks.items() if own != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha or rank,
        "rank_pattern": others,
        "alpha_pattern": {} if alpha else others,
        "target_modules": sorted(ranks),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def _is_matrix(module: str, header: GgufHeader, weight_of: Mapping[str, str]) -> bool:
    """Whether both factors are there, and belong to one whole weight of the base."""
    factors = [header.tensors.get(module + A), header.tensors.get(module + B)]
    return module in weight_of and all(factor is not None and len(factor.shape) == 2 for factor in factors)


def _read(name: str, header: GgufHeader) -> Tensor:
    """float32 values of a tensor."""
    blocks = BLOCK_TYPES[header.types[name]]
    with Reader() as reader:
        stored_OB = reader.tensor(header.info(name))
    grid = blocks.grid(blocks.scales(stored_OB), header.tensors[name].shape[-1])
    return grid.decode(blocks.codes(stored_OB))
