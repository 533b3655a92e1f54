"""adapter_model.bin, a pickle, as the safetensors file that PEFT writes today: only where the user allows it.

torch reads it with ``weights_only``, which builds nothing but tensors and plain containers, in a process of its own with limits
of memory and time. Only the safetensors file comes back.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qmerge.adapters.reading.folder import TENSORS
from qmerge.errors import AdapterError

PICKLE = "adapter_model.bin"

MEMORY_BYTES, MEMORY_PER_BYTE = 4_000_000_000, 4
"""Most memory for the process: this, and so much per byte of the file."""

SECONDS = 600


def is_pickled(folder: Path) -> bool:
    """Whether the folder has its tensors in a pickle only."""
    return (folder / PICKLE).is_file() and not (folder / TENSORS).exists()


def unpickled(folder: Path, copy: Path) -> Path:
    """The adapter's folder with a safetensors file in place of the pickle.

    Args:
        folder: has adapter_model.bin.
        copy: an empty folder; it gets links to the other files.

    Raises:
        AdapterError: torch refuses the file, or reading it takes too much memory or time.
    """
    for path in folder.iterdir():
        if path.name != PICKLE:
            (copy / path.name).symlink_to(path.resolve())
    source = folder / PICKLE
    memory = MEMORY_BYTES + MEMORY_PER_BYTE * source.stat().st_size
    command = [sys.executable, "-m", __name__, str(source), str(copy / TENSORS), str(memory), str(SECONDS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as cause:
        raise AdapterError(f"{source}: reading it took more than {SECONDS} s; is it an adapter?") from cause
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"])[-1]
        raise AdapterError(
            f"{source} is not read ({reason[:200]}): it holds something other than tensors, is damaged, or takes too much memory "
            f"or time. Convert it where you trust it: PeftModel.from_pretrained(…).save_pretrained(…)"
        )
    return copy


def _convert(source: str, out: str, memory: int, seconds: int) -> None:
    """What the process does."""
    import torch
    from safetensors.torch import save_file

    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    except (ImportError, OSError, ValueError):  # not on Windows; not everywhere on macOS
        pass
    tensors = torch.load(source, map_location="cpu", weights_only=True)
    # Tensors that share memory become tensors of their own.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out, metadata={"format": "pt"})


if __name__ == "__main__":
    _convert(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
