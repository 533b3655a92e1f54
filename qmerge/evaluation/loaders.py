"""Stock loaders, asked whether they take a folder: each loads the model by its own code and answers a few tokens.

For ``qmerge verify --loader``. Each needs the library of its name, which is not a dependency of qmerge.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError
from qmerge.evaluation.fidelity import answer
from qmerge.pipeline import dense_values
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Weight

TOKENS = 8
"""How many token ids the model must answer."""

FARTHEST, FARTHEST_EIGHT = 0.05, 0.1
"""Relative distance of logits from those of the stored values: bfloat16 is off by about half a percent on small models and
by a few on deep ones, activations in 8 bits by more."""

PRODUCT_TOLERANCE = 1e-5
"""Relative: two float32 sums over up to 2**14 inputs, in different orders, differ by about √n · 2**-24."""


def by_transformers(folder: Path) -> str:
    """AutoModelForCausalLM, with nothing missing, nothing left over, and finite logits."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    name = f"transformers {transformers.__version__}"
    with failing_as(name), quiet():
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, device_map="cpu", output_loading_info=True, trust_remote_code=False, **kernel(folder)
        )
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise CheckpointError(f"{name} reports {problem}: {sorted(info[problem])[:3]}")
    return f"{type(model).__name__} with {name}, {answers(model, name, folder)}"


def kernel(folder: Path) -> dict[str, Any]:
    """On a CPU, gptqmodel's own choice of a kernel takes 4 bits in few group sizes (7.6): its plain one takes all."""
    import transformers

    config = quantization(folder)
    if config.get("quant_method") == "gptq":
        return {"quantization_config": transformers.GPTQConfig(bits=config["bits"], backend="gptq_torch")}
    if config.get("quant_method") == "awq":
        return {"quantization_config": transformers.AwqConfig(backend="torch_awq")}
    return {}


def quantization(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()).get("quantization_config") or {})


def eight_bit_activations(config: dict[str, Any]) -> bool:
    """Whether loaders round activations to 8 bits too: LLM.int8(), and schemes that say so. (FP8 is dequantized on a CPU.)"""
    groups = (config.get("config_groups") or {}).values()
    return bool(config.get("load_in_8bit")) or any(group.get("input_activations") for group in groups)


def by_gptqmodel(folder: Path) -> str:
    """gptqmodel itself, which checks shapes, bits and group sizes before it loads."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6 does not start on two cores otherwise
    with quiet():
        package = needed("gptqmodel", "gptqmodel", 'pip install "qmerge[gptq]"')
    name = f"gptqmodel {package.__version__}"
    with failing_as(name), quiet():
        backend = (
            package.BACKEND.AWQ_TORCH
            if quantization(folder).get("quant_method") == "awq"
            else package.BACKEND.GPTQ_TORCH
        )
        model = package.GPTQModel.load(str(folder), device="cpu", backend=backend)
    return f"{type(model.model).__name__} with {name}, {answers(model.model, name, folder)}"


def by_auto_gptq(folder: Path) -> str:
    """auto-gptq's layers, weight by weight: its model classes are older than transformers 5, its layers still run. Each
    product must be that of the values that qmerge reads."""
    package = auto_gptq()
    with Reader() as reader:
        weights = [w for w in scan(folder, reader).weights.values() if w.format == "gptq"]
        if not weights:
            raise CheckpointError("auto-gptq reads GPTQ, and no weight of this folder is")
        for weight in weights:
            check_product(weight, reader)
    return f"{len(weights)} weights multiply alike in auto-gptq {getattr(package, '__version__', '')}".rstrip()


def check_product(weight: Weight, reader: Reader) -> None:
    """x · Wᵀ by auto-gptq's QuantLinear, against the same with dequantized values."""
    options: Any = weight.options
    rows, columns = weight.shape
    parts = {local: reader.tensor(info) for local, info in weight.parts.items()}
    file = "qlinear_cuda" if options.act_order else "qlinear_cuda_old"
    layer_class = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{file}").QuantLinear
    layer = layer_class(options.bits, options.group_size, columns, rows, bias=False)
    layer.load_state_dict(parts, strict=False)
    layer.scales = parts["scales"].float()
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    expected = x @ dense_values(weight, reader, torch.device("cpu")).T
    with torch.no_grad():
        error = float((layer(x) - expected).norm() / expected.norm().clamp(min=1e-30))
    if error > PRODUCT_TOLERANCE:
        raise CheckpointError(
            f"{weight.name}: auto-gptq's product is {error:.2g} off; it takes every file for v1 ({options.checkpoint_format})"
        )


def auto_gptq() -> ModuleType:
    """auto-gptq 0.7.1 was archived in 2025: it is given back the names of transformers and peft that it imports."""
    gone = {
        "transformers.modeling_utils": ("no_init_weights",),
        "transformers.utils.hub": ("create_repo", "create_commit", "CommitOperationAdd"),
        "peft.peft_model": ("PEFT_TYPE_TO_MODEL_MAPPING",),
    }
    with contextlib.ExitStack() as stack, quiet():
        for home, names in gone.items():
            for name in names:
                stack.enter_context(mock.patch(f"{home}.{name}", {}, create=True))
        if importlib.util.find_spec("gekko") is None:  # only its AVX2 kernels ask for it
            sys.modules["gekko"] = mock.MagicMock()
            stack.callback(sys.modules.pop, "gekko")
        return needed("auto_gptq", "auto-gptq", "pip install --no-deps auto-gptq==0.7.1, for Python up to 3.11")


LOADERS: dict[str, Callable[[Path], str]] = {
    "transformers": by_transformers,
    "gptqmodel": by_gptqmodel,
    "auto-gptq": by_auto_gptq,
}


def answers(model: Any, name: str, folder: Path) -> str:
    """Logits for a few token ids are those of the stored values, but for how the loader computes.

    Raises:
        CheckpointError: NaN, or further off than any compute dtype explains: the loader reads other values.
    """
    ids_NL = torch.arange(1, TOKENS + 1)[None]
    with failing_as(name), quiet(), torch.no_grad():
        logits = model(input_ids=ids_NL).logits.float()
    if not bool(logits.isfinite().all()):
        raise CheckpointError(f"{name} loads it, but its answer holds NaN or infinity")
    expected = answer(folder, ids_NL)
    error = float((logits - expected).norm() / expected.norm())
    if error > (FARTHEST_EIGHT if eight_bit_activations(quantization(folder)) else FARTHEST):
        raise CheckpointError(
            f"{name} loads it, but answers {error:.0%} off from the stored values: it reads them otherwise"
        )
    return f"answers within {error:.1%} of the stored values"


def needed(module: str, package: str, how: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise RecipeError(f"--loader {package} needs {package}: {how} ({cause})") from cause


@contextlib.contextmanager
def failing_as(name: str) -> Iterator[None]:
    """Whatever a stock loader raises, it means that it does not take the folder."""
    try:
        yield
    except Exception as cause:
        raise CheckpointError(f"{name} does not load it: {cause}") from cause


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loaders print banners and progress to both streams."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield
