"""Small steps that formats share when they find and read weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from qmerge.errors import CheckpointError
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Rows, TensorInfo


def modules_with(local: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Modules that have a tensor of this local name, in the order of ``tensors``."""
    suffix = f".{local}"
    return [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]


def parts_of(module: str, names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Local name → tensor: those of the ``names`` that the module has, in their order."""
    parts = {}
    for local in names:
        info = tensors.get(f"{module}.{local}")
        if info is not None:
            parts[local] = info
    return parts


def check_present(module: str, required: Iterable[str], parts: Mapping[str, TensorInfo], stored_as: str) -> None:
    """Check that no tensor of a weight is missing.

    Args:
        stored_as: name of the format, for the message.

    Raises:
        CheckpointError: one of the ``required`` local names is not among the ``parts``.
    """
    for local in required:
        if local not in parts:
            raise CheckpointError(
                f"{module} is stored as {stored_as}, but {module}.{local} is missing. Download the model again"
            )


def check_dtype(info: TensorInfo, allowed: tuple[str, ...]) -> None:
    """Check the dtype of a tensor.

    Raises:
        CheckpointError: it is not one of the ``allowed`` dtypes (safetensors spelling).
    """
    if info.dtype not in allowed:
        raise CheckpointError(f"{info.name} is {info.dtype}, expected {' or '.join(allowed)}. Download the model again")


def check_finite(values: Tensor, name: str) -> None:
    """Check the scales of a weight.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{name} holds NaN or infinity, so it is damaged. Download the model again")


def read_rows(info: TensorInfo, rows: Rows, reader: Reader) -> Tensor:
    """Some rows of a matrix on disk, [rows, columns], in its own dtype."""
    columns = info.shape[1]
    flat = reader.elements(info, rows.start * columns, rows.stop * columns)
    return flat.view(len(rows), columns)


def experts_warnings(stored_as: str, names: Iterable[str]) -> list[str]:
    """A warning where experts are stored one by one in a format that transformers 5.23 reads no experts of.

    Args:
        stored_as: name of the format, for the message.
        names: of the weights that are stored in it.
    """
    experts = [name for name in names if ".experts." in name]
    if not experts:
        return []
    # gptqmodel 7.6 looks for Mixtral's experts under other names than those of the published models.
    readers = "vLLM and SGLang" if ".block_sparse_moe." in experts[0] else "vLLM, SGLang and gptqmodel"
    warning = (
        f"{len(experts)} weights of experts are stored as {stored_as}: {readers} read them; transformers 5.23 does not, and leaves "
        f"experts at random values. For transformers use --target w4a16"
    )
    return [warning]
