"""Stock loaders: each loads a folder with its own code and computes outputs for one small input.

For ``qmerge verify --loader``. Each needs the library of its name. gptqmodel and auto-gptq are not dependencies of qmerge.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from qmerge.calibration.scores import kl_divergence
from qmerge.calibration.tasks import CAUSAL_LM, task_of
from qmerge.checkpoint.scan import scan
from qmerge.errors import CheckpointError, RecipeError, is_out_of_memory
from qmerge.evaluation.llama_cpp import has_llama_cpp, next_token_logprobs
from qmerge.evaluation.merged import open_merged
from qmerge.evaluation.quiet import silenced
from qmerge.evaluation.sample_inputs import described, question_ids, sample_inputs
from qmerge.evaluation.stored import CannotCompareError, outputs_of, stored_logits, stored_outputs
from qmerge.gguf.base import gguf_file
from qmerge.safetensors_io.reader import Reader
from qmerge.types import Weight
from qmerge.weights.values import dense_values

TOLERANCE, TOLERANCE_8BIT_ACTIVATIONS = 0.05, 0.1
"""Relative distance of logits from those of the stored values. float32 is off by less than 1e-5. Formats whose loaders compute
in 16 bits are off by about half a percent on small models and by a few on deep ones, activations in 8 bits by more."""

LLAMA_CPP_NATS, BEGINNINGS = 0.05, 4
"""Mean KL divergence of llama.cpp's next token from that of the stored values, over so many beginnings of the sentence."""

PRODUCT_TOLERANCE = 1e-5
"""Relative: two float32 sums over up to 2**14 inputs, in different orders, differ by about √n · 2**-24."""


class WrongOutputsError(CheckpointError):
    """A library loads a folder, but its outputs are too far from those of the stored values.

    library   name and version
    distance  ‖outputs − expected‖ / ‖expected‖
    compared  what the outputs are: logits, hidden states
    """

    def __init__(self, library: str, distance: float, compared: str = "logits") -> None:
        super().__init__(
            f"{library} loads it, but its {compared} are {100 * distance:.0f} % off those of the stored values: it reads other "
            f"values"
        )
        self.library = library
        self.distance = distance
        self.compared = compared


def load_with_transformers(folder: Path) -> str:
    """Load with the class that config.json names: nothing missing, nothing left over, and the right outputs.

    Returns:
        One line with the result; so do the other loaders.

    Raises:
        CheckpointError: transformers does not load it, or computes other outputs.
    """
    import transformers

    # Missing keys are checked below; transformers would log them too.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    library = f"transformers {transformers.__version__}"
    file = gguf_file(folder)
    how = {"gguf_file": file.name, "dtype": torch.float32} if file else _cpu_kernel(folder)
    with as_checkpoint_error(library), silenced():
        model, info = _model_class(folder).from_pretrained(
            file.parent if file else folder,
            device_map="cpu",
            output_loading_info=True,
            trust_remote_code=False,
            **how,
        )
    # from_pretrained fills missing weights with random numbers and goes on.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(problem):
            raise CheckpointError(f"{library} reports {problem}: {sorted(info[problem])[:3]}")
    _compute_in_float32(model, quantization_config(folder))
    return f"{type(model).__name__} with {library}, {check_outputs(model, folder, library)}"


def _model_class(folder: Path) -> Any:
    """transformers' class that config.json names; the causal language model of its ``model_type`` where it has no such class."""
    import transformers

    if gguf_file(folder):  # transformers makes the config from the file
        return transformers.AutoModelForCausalLM
    names = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
    return getattr(transformers, names[0], transformers.AutoModelForCausalLM)


def _compute_in_float32(model: Any, quantization: dict[str, Any]) -> None:
    """Let a dense or bitsandbytes model compute in float32, so that only other values can make its logits differ.

    Models in other formats stay as they are: their layers have dtypes of their own.
    """
    if quantization.get("quant_method", "bitsandbytes") != "bitsandbytes":
        return
    for tensor in model.parameters():
        if tensor.dtype in (torch.bfloat16, torch.float16):
            tensor.data = tensor.data.float()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # bitsandbytes' 4-bit layer
            module.compute_dtype = torch.float32
            # The kernel for AVX512-BF16 computes in bfloat16, and repacks the weights.
            module.support_avx512bf16_for_cpu = False


def _cpu_kernel(folder: Path) -> dict[str, Any]:
    """Arguments that choose gptqmodel's plain kernel, which takes all bits and group sizes.

    The one that gptqmodel 7.6 chooses by itself on a CPU takes 4 bits in few group sizes.
    """
    import transformers

    quantization = quantization_config(folder)
    method = quantization.get("quant_method")
    if method == "gptq":
        return {"quantization_config": transformers.GPTQConfig(bits=quantization["bits"], backend="gptq_torch")}
    if method == "awq":
        return {"quantization_config": transformers.AwqConfig(backend="torch_awq")}
    return {}


def quantization_config(folder: Path) -> dict[str, Any]:
    """``quantization_config`` of a folder's config.json; {} where it has none."""
    if gguf_file(folder):
        return {}
    config = json.loads((folder / "config.json").read_text())
    return dict(config.get("quantization_config") or {})


def rounds_activations(quantization: dict[str, Any]) -> bool:
    """Whether loaders round activations to 8 bits too: LLM.int8(), and schemes with ``input_activations``.

    (FP8 is dequantized on a CPU.)
    """
    groups = (quantization.get("config_groups") or {}).values()
    return bool(quantization.get("load_in_8bit")) or any(group.get("input_activations") for group in groups)


def load_with_gptqmodel(folder: Path) -> str:
    """Load with gptqmodel itself, which checks shapes, bits and group sizes before it loads.

    Raises:
        CheckpointError: gptqmodel does not load it, or computes other logits.
        RecipeError: gptqmodel is not installed.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6 does not start on two cores otherwise
    with silenced():
        package = import_library("gptqmodel", "gptqmodel", 'pip install "qmerge[gptq]"')
    library = f"gptqmodel {package.__version__}"
    with as_checkpoint_error(library), silenced():
        backend = package.BACKEND.GPTQ_TORCH
        if quantization_config(folder).get("quant_method") == "awq":
            backend = package.BACKEND.AWQ_TORCH
        model = package.GPTQModel.load(str(folder), device="cpu", backend=backend)
    return f"{type(model.model).__name__} with {library}, {check_outputs(model.model, folder, library)}"


def load_with_mlx(folder: Path) -> str:
    """Load with mlx_lm, which finds every tensor and no other.

    Raises:
        CheckpointError: mlx_lm does not load it, or computes other logits.
        RecipeError: mlx_lm is not installed.
    """
    how_to_install = 'pip install mlx-lm, and "mlx[cpu]" on Linux'
    package = import_library("mlx_lm", "mlx", how_to_install)
    core = import_library("mlx.core", "mlx", how_to_install)
    library = f"mlx_lm {package.__version__}"
    with as_checkpoint_error(library), silenced():
        model, _ = importlib.import_module("mlx_lm.utils").load_model(folder)
        model.set_dtype(core.float32)  # so that only other values can make its logits differ

    def with_logits(input_ids: Tensor) -> SimpleNamespace:
        logits = model(core.array(input_ids.numpy())).astype(core.float32)
        return SimpleNamespace(logits=torch.from_numpy(np.array(logits)))

    return f"{type(model).__module__} with {library}, {check_outputs(with_logits, folder, library)}"


def default_loader(folder: Path) -> str:
    """The loader for a folder where none is named."""
    if gguf_file(folder):
        return "llama.cpp" if has_llama_cpp() else "transformers"
    config = json.loads((folder / "config.json").read_text())
    if "quantization" in config:
        return "mlx"
    # transformers 5.23 leaves experts at random values that gptqmodel reads.
    method = quantization_config(folder).get("quant_method")
    if method in ("gptq", "awq") and importlib.util.find_spec("gptqmodel") and _has_packed_experts(folder):
        return "gptqmodel"
    return "transformers"


def _has_packed_experts(folder: Path) -> bool:
    """Whether separate experts are stored as GPTQ or AWQ codes."""
    with Reader() as reader:
        weights = scan(folder, reader).weights.values()
    return any(".experts." in weight.name and weight.format in ("gptq", "awq") for weight in weights)


def load_with_auto_gptq(folder: Path) -> str:
    """Multiply with auto-gptq's layers, weight by weight, and compare with the values that qmerge reads.

    Its model classes are older than transformers 5; its layers still run.

    Raises:
        CheckpointError: a product differs, or no weight of the folder is stored as GPTQ.
        RecipeError: auto-gptq is not installed.
    """
    package = import_auto_gptq()
    with Reader() as reader:
        weights = [weight for weight in scan(folder, reader).weights.values() if weight.format == "gptq"]
        if not weights:
            raise CheckpointError("auto-gptq reads GPTQ only, and no weight of this folder is stored as GPTQ")
        for weight in weights:
            _check_product(weight, reader)
    return f"{len(weights)} weights multiply alike in auto-gptq {getattr(package, '__version__', '')}".rstrip()


def _check_product(weight: Weight, reader: Reader) -> None:
    """Compare x · Wᵀ by auto-gptq's QuantLinear with the same product of the dequantized values."""
    options: Any = weight.options
    rows, columns = weight.shape
    parts = {local: reader.tensor(info) for local, info in weight.parts.items()}
    # auto-gptq itself chooses by act-order, too: the old class is for groups in sequence.
    module = "qlinear_cuda" if options.act_order else "qlinear_cuda_old"
    layer_class = importlib.import_module(f"auto_gptq.nn_modules.qlinear.{module}").QuantLinear
    layer = layer_class(options.bits, options.group_size, columns, rows, bias=False)
    layer.load_state_dict(parts, strict=False)
    layer.scales = parts["scales"].float()  # float32, as x is
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(0))
    expected = x @ dense_values(weight, reader, torch.device("cpu")).T
    with torch.no_grad():
        error = float((layer(x) - expected).norm() / expected.norm().clamp(min=1e-30))
    if error > PRODUCT_TOLERANCE:
        raise CheckpointError(
            f"{weight.name}: auto-gptq's product is {error:.2g} off; it takes every file for v1 ({options.checkpoint_format})"
        )


def import_auto_gptq() -> ModuleType:
    """Import auto-gptq 0.7.1, archived in 2025, with the names that transformers and peft have removed since."""
    removed = {
        "transformers.modeling_utils": ("no_init_weights",),
        "transformers.utils.hub": ("create_repo", "create_commit", "CommitOperationAdd"),
        "peft.peft_model": ("PEFT_TYPE_TO_MODEL_MAPPING",),
    }
    with contextlib.ExitStack() as stack, silenced():
        for module, names in removed.items():
            for name in names:
                stack.enter_context(mock.patch(f"{module}.{name}", {}, create=True))
        if importlib.util.find_spec("gekko") is None:  # only its AVX2 kernels use it
            sys.modules["gekko"] = mock.MagicMock()
            stack.callback(sys.modules.pop, "gekko")
        return import_library("auto_gptq", "auto-gptq", "pip install --no-deps auto-gptq==0.7.1, for Python up to 3.11")


def load_with_llama_cpp(folder: Path) -> str:
    """Let llama.cpp compute the next token after some beginnings of a sentence, and compare with the stored values.

    llama.cpp rounds activations to 8 bits, and some products to 16; ``LLAMA_CPP_NATS`` allows for that.

    Raises:
        CheckpointError: it does not load the file, or computes something else.
        RecipeError: xllamacpp is not installed.
    """
    file = gguf_file(folder)
    if file is None:
        raise CheckpointError(f"llama.cpp reads GGUF files, and {folder} has none")
    with Reader() as reader:
        checkpoint = open_merged(folder, reader)
        ids_NL = question_ids(checkpoint.config, checkpoint.folder)
        expected = stored_logits(checkpoint, ids_NL, reader)[0].log_softmax(-1)
    lengths = sorted({ids_NL.shape[1] * part // BEGINNINGS for part in range(1, BEGINNINGS + 1)} - {0})
    found = next_token_logprobs(file, [ids_NL[0, :length].tolist() for length in lengths], expected.shape[-1])
    expected = expected[[length - 1 for length in lengths]]
    nats = float(kl_divergence(expected, found).mean())
    if nats > LLAMA_CPP_NATS:
        raise CheckpointError(
            f"llama.cpp loads it, but its answers are {nats:.2g} nats (KL) from those of the stored values"
        )
    return f"llama.cpp answers within {nats:.2g} nats (KL) of the stored values"


LOADERS: dict[str, Callable[[Path], str]] = {
    "transformers": load_with_transformers,
    "llama.cpp": load_with_llama_cpp,
    "gptqmodel": load_with_gptqmodel,
    "auto-gptq": load_with_auto_gptq,
    "mlx": load_with_mlx,
}
"""Name on the command line → loader: folder → one line with the result; CheckpointError where it fails."""


def load(folder: Path, loader: str) -> str:
    """Load ``folder`` with one of ``LOADERS``, without compiling.

    gptqmodel compiles its layers, with transformers too. That takes longer than the one forward pass of this check, and fails
    where there is no C++ compiler, which would be said of a sound folder.
    """
    with torch.compiler.set_stance("force_eager"):
        return LOADERS[loader](folder)


def check_outputs(model: Any, folder: Path, library: str) -> str:
    """Compare a loaded model's outputs for a small input with those of the stored values.

    Returns:
        One line with the result.

    Raises:
        WrongOutputsError: further off than any compute dtype explains.
        CheckpointError: NaN, or the library fails.
    """
    with Reader() as reader:
        checkpoint = open_merged(folder, reader)
        inputs = sample_inputs(checkpoint.config, checkpoint.folder)
        # Computed by transformers' own code from the values that qmerge reads.
        try:
            expected, compared = stored_outputs(checkpoint, inputs, reader)
        except CannotCompareError as problem:
            return f"loads; nothing was computed with it, because {problem}"
        with as_checkpoint_error(library), silenced(), torch.no_grad():
            outputs, _ = outputs_of(model(**inputs))
    if not bool(outputs.isfinite().all()):
        raise CheckpointError(f"{library} loads it, but its {compared} hold NaN or infinity")
    distance = float((outputs - expected).norm() / expected.norm())
    tolerance = TOLERANCE
    if rounds_activations(quantization_config(folder)):
        tolerance = TOLERANCE_8BIT_ACTIVATIONS
    if distance > tolerance:
        raise WrongOutputsError(library, distance, compared)
    line = f"its {compared} for {described(inputs)} are within {100 * distance:.1f} % of those of the stored values"
    if task_of(checkpoint.config) is CAUSAL_LM and "vision_config" in checkpoint.config:
        line += " (no image was shown to it: its vision part was only loaded)"
    return line


def import_library(module: str, package: str, how_to_install: str) -> ModuleType:
    """Import a loader's library.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        raise RecipeError(f"--loader {package} needs {package}: {how_to_install} ({cause})") from cause


@contextlib.contextmanager
def as_checkpoint_error(library: str) -> Iterator[None]:
    """An exception of a stock loader means that it does not load the folder: raise CheckpointError instead. Without enough memory,
    its own error is raised."""
    try:
        yield
    except Exception as cause:
        if is_out_of_memory(cause):  # which says nothing about the folder
            raise
        raise CheckpointError(f"{library} does not load it: {cause}") from cause
