"""What the adapter's files are made of: tensors in a temporary file, because which ranks there are, and so the header of the
adapter, is known only at the end; and adapter_config.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from qmerge.adapters.reading.folder import PREFIX
from qmerge.extract.pairing import PIECE, Anatomy
from qmerge.safetensors_io.writer import no_room_is_an_error
from qmerge.types import TensorSpec


class Spool:
    """Tensors of a file that cannot be laid out yet, one after the other in a temporary file."""

    def __init__(self, path: Path) -> None:
        self.path, self.specs, self._starts, self._end = path, dict[str, TensorSpec](), dict[str, int](), 0
        self._file: BinaryIO = path.open("w+b")

    def add(self, name: str, tensor: Tensor) -> None:
        """A float32 tensor."""
        with no_room_is_an_error(self.path.parent):
            self._file.write(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._file.flush()
        self.specs[name], self._starts[name] = TensorSpec("F32", tuple(tensor.shape)), self._end
        self._end += self.specs[name].nbytes

    def pieces(self, name: str) -> Iterator[bytearray]:
        for start in range(0, self.specs[name].nbytes, PIECE):
            self._file.seek(self._starts[name] + start)
            yield bytearray(self._file.read(min(PIECE, self.specs[name].nbytes - start)))

    def close(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def ranks_of(spool: Spool) -> dict[str, int]:
    """Module → rank."""
    end = ".lora_A.weight"
    return {
        name.removeprefix(PREFIX).removesuffix(end): spec.shape[0]
        for name, spec in spool.specs.items()
        if name.endswith(end)
    }


def adapter_config(
    ranks: Mapping[str, int], saved: Iterable[str], biases: bool, anatomy: Anatomy, transposed: bool
) -> dict[str, Any]:  # fmt: skip
    """As peft writes it. alpha is the rank everywhere, so that the scale is 1."""
    from peft import LoraConfig

    usual = Counter(ranks.values()).most_common(1)[0][0]
    # The first pattern that fits the end of a name counts for peft: longer ones first.
    pattern = {name: ranks[name] for name in sorted(ranks, key=lambda name: -len(name)) if ranks[name] != usual}
    modules = sorted(saved)
    tying = {"ensure_weight_tying": True} if anatomy.tied and anatomy.embedding in modules else {}
    config = LoraConfig(
        r=usual, lora_alpha=usual, rank_pattern=pattern, alpha_pattern=dict(pattern), fan_in_fan_out=transposed,
        target_modules=targets(ranks, anatomy), modules_to_save=modules or None, lora_bias=biases, inference_mode=True,
        **tying,
    )  # fmt: skip
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def targets(ranks: Mapping[str, int], anatomy: Anatomy) -> list[str]:
    """Last parts of the names where they mean exactly these modules, else whole names."""
    last = {name.rpartition(".")[2] for name in ranks}
    meant = {name for name in anatomy.modules if name.rpartition(".")[2] in last}
    return sorted(last if meant == set(ranks) else ranks)
