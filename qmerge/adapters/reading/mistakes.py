"""What was given in place of an adapter folder: a file of it, a model, or an adapter of another library. Each gets its own hint."""

from __future__ import annotations

from pathlib import Path

from qmerge import hub
from qmerge.adapters.reading.training_folder import checkpoints_of
from qmerge.errors import AdapterError
from qmerge.hub import ADAPTER_CONFIG as CONFIG
from qmerge.safetensors_io.header import read_header
from qmerge.schema import NAME as REPORT

OWN_FILES = (CONFIG, *hub.ADAPTER_FILES, "adapter_model.bin")
"""Files of an adapter folder: each stands for the folder."""

WITHOUT_FOLDER = (".safetensors", ".bin", ".pt", ".pth", ".npz", ".ckpt")
"""Endings of files with tensors, which a folder and a config must describe."""

PT_FILES = ("adapter*.pt", "*model*.pt", "*/adapter*.pt", "*/*model*.pt")
"""Of torchtune, in its folder or in that of an epoch. Trainer's optimizer.pt is none."""

MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf")

DIFFUSERS = "pytorch_lora_weights.safetensors"
"""How diffusers calls the LoRA of an image model."""

DIFFUSERS_PARTS = ("lora_unet_", "lora_te", "unet.", "text_encoder.", "transformer.", "lora_transformer_")
"""What the names of the tensors of image models' LoRAs begin with, those of kohya's scripts included."""

MOST_NAMES = 20
"""Tensors whose names are looked at."""


def folder_of_file(location: str) -> str:
    """The adapter folder that a file of it stands for; anything else as it is.

    Raises:
        AdapterError: it is a file of something else.
    """
    path = hub.local_path(location)
    if path is None or not path.is_file() or path.suffix == hub.GGUF:
        return location
    # Users drag the file of tensors into the terminal, as other tools take it.
    if path.name in OWN_FILES and (path.parent / CONFIG).is_file():
        return str(path.parent)
    if path.suffix in WITHOUT_FOLDER:
        raise AdapterError(_file_problem(path))
    raise AdapterError(f"{location} is a file; expected an adapter folder, as PEFT saves it, or a LoRA in a GGUF file")


def _file_problem(path: Path) -> str:
    """What is wrong with a file of tensors that no adapter_config.json describes."""
    if path.suffix == ".safetensors" and _is_of_diffusers(path):
        return f"{path}: {OF_DIFFUSERS}"
    if path.suffix == ".npz":
        return f"{path}: {OLD_MLX}"
    if path.suffix in (".pt", ".pth"):
        return f"{path}: {PT_FILE}"
    return (
        f"{path}: {path.parent} has no {CONFIG}, which says what the tensors of this file mean (rank, alpha, modules): give the "
        f"folder that training saved, with both files"
    )


OF_DIFFUSERS = (
    "this is a LoRA of an image model (diffusers, kohya): qmerge merges adapters of transformers models only; use diffusers' "
    "fuse_lora()"
)
OLD_MLX = (
    "this is an adapter of an old mlx_lm, whose config does not say rank and scale: use mlx_lm.fuse, or train again with an mlx_lm "
    "that writes adapters.safetensors and adapter_config.json"
)
PT_FILE = (
    "a .pt file is a pickle, which is not opened: let torchtune save PEFT's files as safetensors (save_adapter_weights_only: True, "
    "and the FullModelHFCheckpointer with safe_serialization: True), and give that folder"
)


def missing_config_problem(folder: Path) -> str:
    """One line: why a folder without adapter_config.json is not an adapter, and how to go on."""
    if (folder / REPORT).is_file():
        return (
            f"{folder} is a model that qmerge wrote: its adapter is merged into it already. Give the folder of the adapter, or to "
            f"merge another adapter into this model, give it with --base"
        )
    if _is_model(folder):
        return (
            f"{folder} is a model, not an adapter: it has config.json, and no {CONFIG}. Give it with --base, and the adapter with "
            f"--adapter; of a model that an adapter was merged into, or that was trained whole, qmerge extract makes an adapter"
        )
    trained_whole = [folder / name for name in checkpoints_of(folder) if _is_model(folder / name)]
    if trained_whole:
        last = trained_whole[-1]
        return (
            f"{folder} has no adapter: {last.name} in it is a whole model. If that was trained whole, qmerge extract makes an "
            f"adapter of it: qmerge extract {last} BASE --out DIR"
        )
    # One file is enough to tell: collections of image LoRAs hold hundreds.
    diffusers = folder / DIFFUSERS
    if diffusers.is_file() or any(map(_is_of_diffusers, sorted(folder.glob("*.safetensors"))[:1])):
        return f"{folder}: {OF_DIFFUSERS}"
    if (folder / "adapters.npz").is_file():
        return f"{folder}: {OLD_MLX}"
    if any(next(folder.glob(pattern), None) for pattern in PT_FILES):
        return f"{folder}: {PT_FILE}"
    if (folder / "adapters.safetensors").is_file():
        return (
            f"{folder} has no {CONFIG}: the scale of an MLX adapter is in it. It is in the folder of mlx_lm.lora's --adapter-path: "
            f"give that folder"
        )
    return f"{folder} has no {CONFIG}: expected an adapter folder as PEFT saves it, or a training folder with one in it"


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(next(folder.glob(pattern), None) for pattern in MODEL_FILES)


def _is_of_diffusers(file: Path) -> bool:
    try:
        infos, _ = read_header(file, AdapterError)
    except AdapterError:
        return False
    names = list(infos)[:MOST_NAMES]
    return bool(names) and all(name.startswith(DIFFUSERS_PARTS) for name in names)
