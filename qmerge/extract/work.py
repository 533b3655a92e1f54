"""``qmerge extract``: two checkpoints → an adapter folder; all of it or nothing.

Stages: pair the weights, compare every pair (``compare.py``), decide how differences outside linear layers are stored
(``storage.py``), write the tensors (``adapter.py``), then report and config.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qmerge import hub
from qmerge.adapters.reading.folder import CONFIG, TENSORS
from qmerge.checkpoint import folder
from qmerge.checkpoint.at_once import all_or_nothing, check_new
from qmerge.checkpoint.scan import Checkpoint, scan
from qmerge.errors import CheckpointError, RecipeError, RoomError
from qmerge.extract.adapter import SPOOL, LoraSpool, adapter_config, write_tensors
from qmerge.extract.compare import PairComparison
from qmerge.extract.decompose import factor_entries
from qmerge.extract.difference import PairReader
from qmerge.extract.pairing import CheckpointPair, pair_checkpoints
from qmerge.extract.result import MODULES_TO_SAVE, Differences, Extraction
from qmerge.extract.storage import add_biases, needs_fan_in_fan_out, whole_weights
from qmerge.extract.warnings import checkpoint_warnings, result_warnings
from qmerge.progress import NoProgress, Progress
from qmerge.safetensors_io.reader import Reader
from qmerge.weights.context import compute_device

REPORT = "qmerge_extract.json"

FILES = (SPOOL, TENSORS, REPORT, CONFIG)
"""What is in the output folder, now or in the end."""


def extract(
    merged: str,
    base: str,
    out: Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    save_modules: bool = False,
    device: str = "auto",
    revision: str | None = None,
    merged_revision: str | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Write MERGED − BASE as a LoRA for BASE.

    Args:
        merged, base: folders or Hub ids, stored in any format that qmerge reads.
        out: the folder to write; new or empty.
        rank: the rank of every LoRA (lower where the delta has a lower one). Give this, or
        energy: the share of ‖delta‖² that each LoRA must keep, with the smallest rank that does; above 0, at most 1.
        save_modules: also store differences outside linear layers.
        device: ``auto``, ``cpu`` or ``cuda``.
        revision, merged_revision: of BASE and MERGED on the Hub.

    Raises:
        RecipeError: neither or both of rank and energy, or ``out`` cannot be used.
        CheckpointError: not two checkpoints of one model, or no linear layer differs.
        NumbersError: NaN or infinity.
        RoomError: not enough disk space. Nothing is left behind by any error.
    """
    check_request(rank, energy)
    progress = progress or NoProgress()
    torch_device = compute_device(device)
    out = out.expanduser()
    merged_folder = hub.resolve(merged, merged_revision, CheckpointError).folder
    base_folder = hub.resolve(base, revision, CheckpointError).folder
    with Reader() as reader:
        run = ExtractionRun(
            merged=merged,
            base=base,
            revision=revision,
            out=out,
            rank=rank,
            energy=energy,
            save_modules=save_modules,
            checkpoints=pair_checkpoints(scan(merged_folder, reader), scan(base_folder, reader)),
            reader=PairReader(reader, torch_device),
            progress=progress,
        )
        # After the pairing: a wrong model is the more useful error of the two.
        check_new(out, {"MERGED": merged_folder, "BASE": base_folder}, FILES, last=CONFIG)
        try:
            with all_or_nothing(out, FILES):
                return run.run()
        finally:
            progress.end()


def check_request(rank: int | None, energy: float | None) -> None:
    """Raise RecipeError unless exactly one of the two is given, and in its range."""
    if (rank is None) == (energy is None):
        raise RecipeError("give either --rank R (one rank for all weights) or --energy SHARE (for example 0.95)")
    if rank is not None and rank < 1:
        raise RecipeError(f"--rank {rank}: expected 1 or more")
    if energy is not None and not 0 < energy <= 1:
        raise RecipeError(f"--energy {energy}: expected a share of the squared difference, above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class ExtractionRun:
    """One extraction; fields as the arguments of ``extract``."""

    merged: str
    base: str
    revision: str | None
    out: Path
    rank: int | None
    energy: float | None
    save_modules: bool
    checkpoints: CheckpointPair
    reader: PairReader
    progress: Progress

    def run(self) -> Extraction:
        """All stages."""
        self.check_room()
        with LoraSpool(self.out) as spool:
            differing = self.compare(spool)
            nbytes, config = self.write_tensors(spool, differing)
        result = self.summarize(differing, nbytes)
        folder.write_json(self.out / REPORT, result.to_json())
        # Last: an adapter without its config does not load.
        folder.write_json(self.out / CONFIG, config, sort_keys=True)
        return result

    def check_room(self) -> None:
        """Raise RoomError where the disk has no room for the factors. With ``--energy`` their ranks are not known yet."""
        entries = 0
        for pair in self.checkpoints.weights:
            if pair.is_linear:
                entries += factor_entries(pair.shape, self.rank or 0)
        # Twice in float32: in the temporary file and in the adapter.
        if folder.free_bytes(self.out) < 2 * 4 * entries:
            raise RoomError(f"--out {self.out}: no room on the disk for the adapter; free some space")

    def compare(self, spool: LoraSpool) -> Differences:
        """All differences, and how they are stored; the factors of the LoRAs go to ``spool``."""
        comparison = PairComparison(self.checkpoints, self.reader, spool, rank=self.rank, energy=self.energy)
        differing = comparison.compare_all(self.progress)
        if self.save_modules:
            differing.others = [replace(other, saved=other.savable) for other in differing.others]
        return differing

    def write_tensors(self, spool: LoraSpool, differing: Differences) -> tuple[int, dict[str, Any]]:
        """Write adapter_model.safetensors. Returns its size in bytes, and the content of adapter_config.json for it."""
        has_biases = add_biases(spool, differing, self.checkpoints, self.reader)
        saved_modules = differing.modules_saved_as(MODULES_TO_SAVE)
        nbytes = write_tensors(self.out, spool, whole_weights(saved_modules, self.checkpoints), self.reader)
        config = adapter_config(
            spool.ranks(),
            self.checkpoints.modules,
            saved=saved_modules,
            lora_bias=has_biases,
            fan_in_fan_out=needs_fan_in_fan_out(differing, self.checkpoints),
        )
        config |= {"base_model_name_or_path": self.base, "revision": self.revision}
        return nbytes, config | task_type(self.checkpoints.base)

    def summarize(self, differing: Differences, nbytes: int) -> Extraction:
        """The result, with its warnings."""
        result = Extraction(
            merged=self.merged,
            base=self.base,
            out=self.out,
            fits=tuple(differing.fits),
            others=tuple(differing.others),
            identical=differing.identical,
            nbytes=nbytes,
        )
        lines = [*result_warnings(result, self.save_modules), *checkpoint_warnings(self.checkpoints, result)]
        return replace(result, warnings=tuple(lines))


def task_type(base: Checkpoint) -> dict[str, Any]:
    """peft's ``task_type`` for a causal language model; nothing for other models."""
    architectures = base.config.get("architectures") or [""]
    architecture = str(architectures[0])
    is_causal = architecture.endswith("ForCausalLM") or "LMHead" in architecture
    return {"task_type": "CAUSAL_LM"} if is_causal else {}
