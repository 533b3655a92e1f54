"""peft's two files of an adapter: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from qmerge.adapters.reading.folder import PREFIX, TENSORS
from qmerge.extract.difference import CHUNK_BYTES, PairReader
from qmerge.extract.modules import ModelModules
from qmerge.extract.pairing import WeightPair
from qmerge.formats import get_format
from qmerge.safetensors_io.disk import PARTIAL, disk_errors, open_for_writing, remove
from qmerge.safetensors_io.writer import FileLayout, ShardWriter
from qmerge.types import TensorSpec

# Names after the module.
A_SUFFIX = ".lora_A.weight"
B_SUFFIX = ".lora_B.weight"
BIAS_SUFFIX = ".lora_B.bias"

SPOOL = f"{TENSORS}.factors"
"""Name, without ``PARTIAL``, of the temporary file with the factors."""


# --- tensors ---------------------------------------------------------------------------------------------------------


class LoraSpool:
    """The tensors of all LoRAs in a temporary file. They go to the adapter at the end, because the header of a safetensors
    file comes first and needs all ranks.

    ``specs``: name in the adapter → dtype and shape, in the order of the file.
    """

    def __init__(self, out: Path) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self.path = out / f"{SPOOL}{PARTIAL}"
        self._starts: dict[str, int] = {}
        self._end = 0
        self._file: BinaryIO = os.fdopen(open_for_writing(self.path), "w+b")

    def add_factors(self, module: str, A_RI: Tensor, B_OR: Tensor) -> None:
        """Add both float32 factors of the LoRA of a module."""
        self.add(f"{PREFIX}{module}{A_SUFFIX}", A_RI)
        self.add(f"{PREFIX}{module}{B_SUFFIX}", B_OR)

    def add_bias(self, module: str, bias_O: Tensor) -> None:
        """Add the float32 difference of a module's bias."""
        self.add(f"{PREFIX}{module}{BIAS_SUFFIX}", bias_O)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a float32 tensor.

        Raises:
            RoomError: not enough disk space.
        """
        with disk_errors(self.path.parent):
            self._file.write(tensor.detach().cpu().contiguous().numpy().tobytes())
            self._file.flush()  # a full disk is an error here, not at some later tensor
        self.specs[name] = TensorSpec("F32", tuple(tensor.shape))
        self._starts[name] = self._end
        self._end += self.specs[name].nbytes

    def chunks(self, name: str) -> Iterator[bytearray]:
        """The bytes of a tensor, in chunks of at most ``CHUNK_BYTES``."""
        nbytes = self.specs[name].nbytes
        for start in range(0, nbytes, CHUNK_BYTES):
            self._file.seek(self._starts[name] + start)
            yield bytearray(self._file.read(min(CHUNK_BYTES, nbytes - start)))

    def ranks(self) -> dict[str, int]:
        """Module → rank of its LoRA."""
        ranks = {}
        for name, spec in self.specs.items():
            if name.endswith(A_SUFFIX):
                ranks[name.removeprefix(PREFIX).removesuffix(A_SUFFIX)] = spec.shape[0]
        return ranks

    def __enter__(self) -> LoraSpool:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        """Close and remove the file."""
        if error:
            with suppress(OSError):  # what could not be written is written again here
                self._file.close()
            remove(self.path)
        else:
            # Here an error of the disk is one of the run.
            self._file.close()
            self.path.unlink()


def write_tensors(out: Path, spool: LoraSpool, whole: Mapping[str, WeightPair], reader: PairReader) -> int:
    """Write adapter_model.safetensors. Returns its size in bytes.

    Args:
        whole: name in the adapter → weights that are stored whole, with the values of MERGED.

    Raises:
        RoomError: not enough disk space.
    """
    specs = {**spool.specs, **{name: whole_spec(pair) for name, pair in whole.items()}}
    writer = ShardWriter(out / TENSORS, FileLayout.of(specs))
    try:
        sink = writer.step(tuple(specs))
        for name in spool.specs:
            for chunk in spool.chunks(name):
                sink.append_bytes(name, chunk)
        for name, pair in whole.items():
            for values in reader.merged_values(pair):
                sink.append(name, values)
        sink.finish()
        nbytes = int(writer.finish()["bytes"])
        writer.publish()
    finally:
        writer.close()
    return nbytes


def whole_spec(pair: WeightPair) -> TensorSpec:
    """dtype and shape of a weight that is stored whole: as in MERGED where it is dense there, else float32."""
    dtype = get_format(pair.merged.format).info.dense_dtype or "F32"
    return TensorSpec(dtype, pair.base.shape)


# --- config ----------------------------------------------------------------------------------------------------------


def adapter_config(
    ranks: Mapping[str, int], modules: ModelModules, *, saved: Iterable[str], lora_bias: bool, fan_in_fan_out: bool
) -> dict[str, Any]:
    """adapter_config.json as peft writes it. alpha equals the rank everywhere, so that the scale is 1.

    Args:
        ranks: module → rank of its LoRA.
        saved: modules that are stored whole.
    """
    from peft import LoraConfig

    # The rank of most modules goes to r, all others to rank_pattern.
    usual_rank = Counter(ranks.values()).most_common(1)[0][0]
    # peft uses the first pattern that fits the end of a name: longer ones must come first.
    longest_first = sorted(ranks, key=lambda name: -len(name))
    pattern = {name: ranks[name] for name in longest_first if ranks[name] != usual_rank}
    modules_to_save = sorted(saved)
    tying = {}
    if modules.tied_weight and modules.input_embedding in modules_to_save:
        tying = {"ensure_weight_tying": True}
    config = LoraConfig(
        r=usual_rank,
        lora_alpha=usual_rank,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        fan_in_fan_out=fan_in_fan_out,
        target_modules=target_modules(ranks, modules),
        modules_to_save=modules_to_save or None,
        lora_bias=lora_bias,
        inference_mode=True,
        **tying,
    )
    # Sets have another order in every process; peft itself writes them as lists.
    return {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}


def target_modules(ranks: Mapping[str, int], modules: ModelModules) -> list[str]:
    """``q_proj``, ``v_proj``, …: the last parts of the names where these mean exactly the adapted modules, else whole names."""
    last_parts = {name.rpartition(".")[2] for name in ranks}
    meant = {name for name in modules.names if name.rpartition(".")[2] in last_parts}
    return sorted(last_parts if meant == set(ranks) else ranks)
