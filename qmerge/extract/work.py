"""``extract``: every weight of both checkpoints, one at a time, into an adapter; all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qmerge import hub
from qmerge.adapters.reading.folder import CONFIG, PREFIX, TENSORS
from qmerge.checkpoint import folder
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, RecipeError, RoomError, listed
from qmerge.extract.adapter import Spool, adapter_config, ranks_of
from qmerge.extract.decompose import Fit, decompose_to, entries, factors
from qmerge.extract.pairing import Anatomy, Pair, anatomy_of, blocks, differences, pair_up, same_bytes
from qmerge.extract.views import Extraction, Other, between, warnings
from qmerge.formats import get_format
from qmerge.progress import NoProgress, Progress
from qmerge.safetensors_io.reader import Reader
from qmerge.safetensors_io.writer import PARTIAL, FileLayout, ShardWriter
from qmerge.types import Rows, TensorSpec, dot
from qmerge.weights.context import compute_device

REPORT = "qmerge_extract.json"

WITHOUT_LORA_BIAS = ("hqq", "torchao")
"""Formats whose layers peft gives no ``lora_bias`` (0.21: tuners/lora/hqq.py, torchao.py)."""


def extract(
    merged: str, base: str, out: Path, rank: int | None = None, energy: float | None = None, save_modules: bool = False,
    device: str = "auto", revision: str | None = None, merged_revision: str | None = None, progress: Progress | None = None,
) -> Extraction:  # fmt: skip
    """Write MERGED − BASE as a LoRA for BASE.

    Args:
        merged, base: folders or Hub ids, stored in any format that qmerge reads.
        rank: of every weight (fewer where the delta has fewer), or
        energy: the share of ‖delta‖² that the smallest rank of each weight shall keep.
        save_modules: also store what differs and is no linear layer.

    Raises:
        RecipeError: neither or both of rank and energy; ``out`` cannot be used.
        CheckpointError: not two checkpoints of one model, or no linear layer differs. Nothing is written.
        NumbersError: NaN or infinity.
        RoomError: no room on the disk. Nothing is kept.
    """
    check_request(rank, energy)
    progress = progress or NoProgress()
    place, out = compute_device(device), out.expanduser()
    sources = [
        hub.resolve(name, at, CheckpointError) for name, at in ((merged, merged_revision), (base, revision))
    ]  # fmt: skip
    with Reader() as reader:
        theirs, ours = (scan(source.folder, reader) for source in sources)
        anatomy = anatomy_of(ours)
        pairs = pair_up(theirs, ours, anatomy)
        folder.check_out(out, {"MERGED": sources[0].folder, "BASE": sources[1].folder}, resume=False)
        with whole_or_nothing(out, progress):
            work = Work(reader, place, anatomy, pairs, out, rank, energy, save_modules, progress)
            work.check_room()
            found, nbytes, config = work.done()
            result = Extraction(merged, base, out, tuple(found.fits), tuple(found.others), found.identical, nbytes)
            lines = (*warnings(result, save_modules), *between(theirs, ours, pairs, result))
            result = replace(result, warnings=lines)
            folder.write_json(out / REPORT, result.described())
            about = {"base_model_name_or_path": base, "revision": revision, **task(ours)}
            folder.write_json(out / CONFIG, {**config, **about}, sort_keys=True)  # last: without it, nothing loads
    return result


@contextmanager
def whole_or_nothing(out: Path, progress: Progress) -> Iterator[None]:
    """The output folder, locked; whatever goes wrong, nothing stays that was not there before."""
    existed = out.exists()
    with folder.locked(out):
        try:
            yield
        except BaseException as cause:
            for name in (REPORT, CONFIG):
                (out / name).unlink(missing_ok=True)
            folder.discard(out, made_by_us=not existed)
            if isinstance(cause, RoomError):
                raise RoomError(f"--out {out}: no room for the adapter. Nothing was kept.") from cause
            raise
        finally:
            progress.end()


def check_request(rank: int | None, energy: float | None) -> None:
    if (rank is None) == (energy is None):
        raise RecipeError("give either --rank R, one rank for all, or --energy SHARE, such as 0.95")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy {energy}: expected a share of the delta's square, above 0 and at most 1")


def task(base: Checkpoint) -> dict[str, Any]:
    """peft's word for what the model is for, where it is the usual thing."""
    names = base.config.get("architectures") or [""]
    return {"task_type": "CAUSAL_LM"} if str(names[0]).endswith("ForCausalLM") or "LMHead" in str(names[0]) else {}


# --- the work --------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What the walk over the weights gathers."""

    fits: list[Fit] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    identical: int = 0


@dataclass
class Work:
    """One extraction: the walk over the weights, then the files."""

    reader: Reader
    device: torch.device
    anatomy: Anatomy
    pairs: Sequence[Pair]
    out: Path
    rank: int | None
    energy: float | None
    save_modules: bool
    progress: Progress

    def check_room(self) -> None:
        """For the factors twice: in the temporary file and in the adapter. (``--energy``: not known before.)"""
        nbytes = 4 * sum(entries(pair.shape, self.rank or 0) for pair in self.pairs if pair.linear)
        if folder.free_bytes(self.out) < 2 * nbytes:
            raise RoomError("no room")

    def done(self) -> tuple[Found, int, dict[str, Any]]:
        """The adapter's tensors, written: what was found, the size of the file, and the config that belongs to it."""
        self.progress.stage("extracting", sum(pair.merged.nbytes + pair.base.nbytes for pair in self.pairs))
        spool = Spool(self.out / (TENSORS + ".factors" + PARTIAL))
        try:
            found = self.walk(spool)
            if self.save_modules:
                found.others = [replace(other, saved=other.savable) for other in found.others]
            saved = self.saved(found)
            biases = self.add_biases(found, spool)
            nbytes = self.write(spool, saved)
        finally:
            spool.close()
        config = adapter_config(ranks_of(spool), saved, biases, self.anatomy, self.fan_in_fan_out(found))
        return found, nbytes, config

    def walk(self, spool: Spool) -> Found:
        """Raises CheckpointError when no linear layer differs."""
        found = Found()
        for pair in self.pairs:
            if pair.base.numel and pair.linear and not pair.raw:
                fit = self.fit(pair, spool)
                found.fits += [fit] if fit else []
                found.identical += fit is None
            elif pair.base.numel and (other := self.compared(pair)):
                found.others.append(other)
            self.progress.advance(pair.merged.nbytes + pair.base.nbytes, pair.name)
        if not found.fits:
            names = [other.name for other in found.others]
            what = f"only {listed(names)}" if names else "every weight is the same"
            raise CheckpointError(f"MERGED differs from BASE in no linear layer ({what}): there is no LoRA to extract")
        return found

    def fit(self, pair: Pair, spool: Spool) -> Fit | None:
        """The LoRA of one weight, written to the spool; None where nothing differs."""
        delta_OI, base = torch.empty(pair.shape, device=self.device), 0.0
        for rows, base_OI, block_OI in differences(pair, self.reader, self.device):
            delta_OI[rows.start : rows.stop] = block_OI
            base += dot(base_OI, base_OI)
        delta = dot(delta_OI, delta_OI)
        if not delta:
            return None
        found, rank = decompose_to(delta_OI, self.rank, self.energy, delta)
        A_RI, B_OR = factors(found, rank)
        left = sum(lost(delta_OI, A_RI, B_OR, rows) for rows in blocks(pair))
        spool.add(f"{PREFIX}{pair.module}.lora_A.weight", A_RI)
        spool.add(f"{PREFIX}{pair.module}.lora_B.weight", B_OR)
        squares_K = found.s_K.double().square().cpu()
        return Fit(pair.name, pair.module, pair.shape, rank, delta, base, left, squares_K, found.whole)

    def compared(self, pair: Pair) -> Other | None:
        """A weight that gets no LoRA, where it differs."""
        if pair.raw:
            same = same_bytes(pair.merged, pair.base, self.reader)
            return None if same else Other(pair.name, pair.module, None, None, None)
        delta = base = 0.0
        for _, base_OI, delta_OI in differences(pair, self.reader, self.device):
            delta, base = delta + dot(delta_OI, delta_OI), base + dot(base_OI, base_OI)
        return Other(pair.name, pair.module, delta, base, self.savable(pair)) if delta else None

    def members(self, module: str) -> list[Pair]:
        return [pair for pair in self.pairs if pair.module == module]

    def savable(self, pair: Pair) -> str | None:
        """How peft can hold a weight that is no linear layer: a linear layer's bias beside its LoRA, a module without
        modules in it whole, unless BASE has it quantized."""
        if pair.module in self.anatomy.linear:
            formats = {other.base.format for other in self.pairs if other.linear}
            return "lora_bias" if pair.local == "bias" and not formats & set(WITHOUT_LORA_BIAS) else None
        dense = all(get_format(other.base.format).info.is_dense for other in self.members(pair.module))
        return "modules_to_save" if pair.module in self.anatomy.leaves and dense else None

    def saved(self, found: Found) -> dict[str, list[Pair]]:
        """Modules that are stored whole, with all of their tensors."""
        modules = dict.fromkeys(other.module for other in found.others if other.saved == "modules_to_save")
        return {module: self.members(module) for module in modules}

    def add_biases(self, found: Found, spool: Spool) -> bool:
        """Differences of biases as ``lora_B.bias``: peft wants one in every LoRA, so the others get zeros, and a layer of
        which nothing but the bias differs gets a LoRA of zeros."""
        changed = {other.module for other in found.others if other.saved == "lora_bias"}
        if not changed:
            return False
        adapted = {fit.module for fit in found.fits}
        biases = {pair.module: pair for pair in self.pairs if pair.local == "bias"}
        for pair in (pair for pair in self.pairs if pair.linear and pair.module in adapted | changed):
            bias_O = torch.zeros(pair.shape[0])
            if pair.module in changed:
                (_, _, delta_1O), *_ = differences(biases[pair.module], self.reader, self.device)
                bias_O = delta_1O[0]
            if pair.module not in adapted:
                spool.add(f"{PREFIX}{pair.module}.lora_A.weight", torch.zeros(1, pair.shape[1]))
                spool.add(f"{PREFIX}{pair.module}.lora_B.weight", torch.zeros(pair.shape[0], 1))
            spool.add(f"{PREFIX}{pair.module}.lora_B.bias", bias_O)
        return True

    def fan_in_fan_out(self, found: Found) -> bool:
        """Whether peft will meet Conv1D layers: not where they are quantized, which makes them ordinary linear layers."""
        adapted = {fit.name for fit in found.fits}
        dense = (pair for pair in self.pairs if get_format(pair.base.format).info.is_dense)
        return any(pair.conv1d and pair.name in adapted for pair in dense)

    def write(self, spool: Spool, saved: Mapping[str, Sequence[Pair]]) -> int:
        """adapter_model.safetensors, of factors and of modules that are stored whole; returns its size."""
        whole = {PREFIX + pair.name: pair for members in saved.values() for pair in members}
        tied, embedding = self.anatomy.tied, self.anatomy.embedding
        if tied and embedding and embedding in saved:  # peft stores (and wants) it under both names
            whole[PREFIX + tied] = saved[embedding][0]
        specs = {**spool.specs, **{name: spec_of(pair) for name, pair in whole.items()}}
        writer = ShardWriter(self.out / TENSORS, FileLayout.of(specs))
        try:
            sink = writer.step(tuple(specs))
            for name in spool.specs:
                for piece in spool.pieces(name):
                    sink.append_bytes(name, piece)
            for name, pair in whole.items():
                for data in self.values_of(pair):
                    sink.append(name, data)
            sink.finish()
            nbytes = int(writer.finish()["bytes"])
            writer.publish()
        finally:
            writer.close()
        return nbytes

    def values_of(self, pair: Pair) -> Iterator[Tensor]:
        """A weight of MERGED, in its own dtype where it is dense there, else float32."""
        form = get_format(pair.merged.format)
        stored = form.open(pair.merged, self.reader, self.device)
        for rows in blocks(pair):
            yield stored.codes(rows) if form.info.is_dense else stored.values(rows)


def lost(delta_OI: Tensor, A_RI: Tensor, B_OR: Tensor, rows: Rows) -> float:
    """‖delta − B A‖² of some rows, of the factors that are written."""
    left_OI = delta_OI[rows.start : rows.stop] - B_OR[rows.start : rows.stop] @ A_RI
    return dot(left_OI, left_OI)


def spec_of(pair: Pair) -> TensorSpec:
    return TensorSpec(get_format(pair.merged.format).info.dense_dtype or "F32", pair.base.shape)
