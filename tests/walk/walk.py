"""One architecture from its config to a verdict: build, adapt, merge, reload, compare."""

from __future__ import annotations

import json
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitsAndBytesConfig

from qmerge.errors import QmergeError

from ..parity import stock
from .adapter import RANK, adapted
from .architectures import Architecture
from .inputs import inputs_of, outputs_of
from .sizes import tiny_config
from .verdicts import CRASH, OK, REFUSED, UNBUILT, WRONG, Outcome

WEIGHT_BOUND = 2 * (RANK + 2) * 2**-24
"""‖ours − peft's‖ / ‖peft's‖ of a merged weight: float32 sums of RANK products, scaled and added, in two orders."""

OUTPUT_BOUND = 4 * 15 * 2**-24 * 160**0.5
"""float32 in another order: see parity/test_merge.py."""

OF_PEFTS_OWN = 4
"""Where a model amplifies rounding (close routers, deep norms), the outputs of peft's own merge tell by how much."""

MOST_PARAMETERS = 40_000_000

TASKS = {
    "causal": "CAUSAL_LM", "image-text": "CAUSAL_LM", "seq2seq": "SEQ_2_SEQ_LM", "sequence": "SEQ_CLS", "token": "TOKEN_CLS",
}  # fmt: skip
"""Head → ``task_type`` of the adapter, which makes peft train the classifier, too."""

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}

Result = TypeVar("Result")


class UnbuiltError(Exception):
    """transformers or peft cannot build, adapt, save or load the model."""


class WrongError(Exception):
    """The merged model is not what it should be."""


def walk(architecture: Architecture) -> Outcome:
    """Everything that the page says about an architecture."""
    outcome = Outcome(architecture.head, architecture.model_type, architecture.class_name)
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            _walk(outcome, architecture, Path(folder))
        finally:
            logging.disable(logging.NOTSET)
    return outcome


def _walk(outcome: Outcome, architecture: Architecture, folder: Path) -> None:
    made, outcome.fp32 = _verdict(outcome, "", lambda: make(architecture, folder))
    if made is None:
        return
    outcome.error, outcome.fp32 = _verdict(outcome, "fp32: ", made.check_fp32)
    if outcome.fp32 == OK and outcome.error is None:
        outcome.notes.append(f"weights compared, not outputs: {_one_line(made.problem)[:100]}")
    if outcome.error and outcome.error > OUTPUT_BOUND:
        outcome.notes.append("peft's own merge differs as much: this model's code goes past some of the LoRA layers")
    if outcome.fp32 == OK:
        _, outcome.nf4 = _verdict(outcome, "nf4: ", made.check_nf4)


def _verdict(outcome: Outcome, label: str, action: Callable[[], Result]) -> tuple[Result | None, str]:
    """What an action returns, and its verdict; where it fails, the outcome gets the reason as a note."""
    try:
        return action(), OK
    except UnbuiltError as cause:
        verdict, reason = UNBUILT, str(cause)
    except WrongError as cause:
        verdict, reason = WRONG, str(cause)
    except QmergeError as cause:
        verdict, reason = REFUSED, str(cause)
    except Exception as cause:
        frame = traceback.extract_tb(cause.__traceback__)[-1]
        verdict, reason = CRASH, f"{type(cause).__name__}: {cause} ({Path(frame.filename).name}:{frame.lineno})"
    outcome.notes.append(label + _one_line(reason))
    return None, verdict


def _one_line(text: str) -> str:
    """Text for a cell of a table: without folders, which are other ones each time."""
    return re.sub(r"(?<![\w.])/\S*/", "", " ".join(text.split()))[:240].replace("|", "¦")


# --- base and adapter ------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Made:
    """A base and an adapter on disk, and the stock libraries' answers.

    Attributes:
        inputs: None where the model could not be run.
        problem: why outputs cannot be compared.
        expected: outputs of the unmerged adapter model, float32.
        alone: outputs of the base.
        by_peft: outputs of peft's own float32 merge.
        weights: parameters of peft's own float32 merge.
        reported: keys that transformers reports as missing or unexpected in the base itself.
    """

    model_class: Any
    folder: Path
    inputs: dict[str, Tensor] | None
    problem: str
    expected: dict[str, Tensor] = field(default_factory=dict)
    alone: dict[str, Tensor] = field(default_factory=dict)
    by_peft: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    reported: set[str] = field(default_factory=set)

    def check_fp32(self) -> float | None:
        """The largest distance of an output from the unmerged adapter model's; None where outputs cannot tell (``problem``).

        Raises:
            WrongError: a weight or an output is not what it should be.
        """
        model = self.loaded(self.merged("fp32"))
        self._check_weights(model)
        if self.inputs is None:
            return None
        error = largest_distance(outputs_of(model, self.inputs), self.expected)
        by_peft = largest_distance(self.by_peft, self.expected)
        alone = largest_distance(self.alone, self.expected)
        if by_peft > alone / 10:
            self.problem = f"peft's own merge is off by {by_peft:.0e}, the base by {alone:.0e}"
            return None
        bound = max(OUTPUT_BOUND, OF_PEFTS_OWN * by_peft)
        if not error < bound:
            raise WrongError(f"outputs are off by {error:.1e}, more than {bound:.1e}")
        if not alone > 10 * error:
            raise WrongError("the control: the base alone answers the same")
        return error

    def merged(self, target: str, **more: Any) -> Path:
        """qmerge's output, in a folder of the target's name."""
        return stock.merged(self.folder / target, self.folder / "base", self.folder / "adapter", target, **more)

    def _check_weights(self, model: Any) -> None:
        far: dict[str, float] = {}
        for name, parameter in model.named_parameters():
            expected = self.weights[name]
            if not torch.equal(parameter, expected):
                far[name] = stock.distance(parameter.float(), expected.float())
        wrong = {name: distance for name, distance in far.items() if not distance < WEIGHT_BOUND}
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            raise WrongError(
                f"{len(wrong)} of {len(self.weights)} weights are not peft's, {worst} by {wrong[worst]:.1e}"
            )

    def check_nf4(self) -> None:
        """Compare every linear layer with what bitsandbytes makes of the fp32 merge, with the same layers left dense.

        Raises:
            WrongError: another value, or a tensor that transformers does not load.
            UnbuiltError: transformers cannot quantize the model, or cannot load what it has quantized and saved itself.
        """
        out = self.merged("nf4")
        quantized = self._quantized_by_transformers(_skip_list(out))
        expected = stock.weights_of(quantized)
        try:
            values = stock.weights_of(self.loaded(out))
        except Exception:
            self._check_that_transformers_reloads(quantized)
            raise
        if expected.keys() != values.keys():
            raise WrongError(f"other layers: {sorted(expected.keys() ^ values.keys())[:3]}")
        other = [name for name in expected if not torch.equal(expected[name], values[name])]
        if other:
            raise WrongError(
                f"{len(other)} of {len(expected)} weights are not what bitsandbytes makes of them: {other[:3]}"
            )

    def _quantized_by_transformers(self, skip: list[str] | None) -> Any:
        settings = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=skip)
        try:
            return self.model_class.from_pretrained(
                self.folder / "fp32",
                dtype=torch.float32,
                quantization_config=settings,
                device_map="cpu",
            )
        except Exception as cause:
            raise UnbuiltError(f"transformers cannot quantize it: {type(cause).__name__}: {cause}") from cause

    def _check_that_transformers_reloads(self, quantized: Any) -> None:
        try:
            quantized.save_pretrained(self.folder / "stock")
            stock.weights_of(self.loaded(self.folder / "stock"))
        except Exception as cause:
            raise UnbuiltError(
                f"transformers does not load what it saves in NF4: {type(cause).__name__}: {cause}"
            ) from cause

    def loaded(self, folder: Path) -> Any:
        """Raises WrongError where transformers misses a tensor, or does not know one."""
        model, info = self.model_class.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, device_map="cpu"
        )
        reported = sorted(_reported(info) - self.reported)
        if reported:
            raise WrongError(f"transformers misses or does not know {reported[:3]}")
        return model.eval()


def make(architecture: Architecture, folder: Path) -> Made:
    """A base and an adapter of an architecture.

    Raises:
        UnbuiltError: the stock libraries cannot build, save, load, adapt or merge it.
    """
    task = TASKS.get(architecture.head)
    return made_of(built(architecture), folder, lambda model: adapted(model, task, folder / "adapter"))


def made_of(
    model: Any, folder: Path, adapt: Callable[[Any], PeftModel], others: Mapping[str, Tensor] | None = None
) -> Made:
    """Save a base, and an adapter of it in ``folder / "adapter"``, and ask the stock libraries.

    Args:
        adapt: wraps the model and saves the adapter.
        others: more tensors for the file of the base.

    Raises:
        UnbuiltError: one of them cannot do it.
    """
    model_class = type(model)
    try:
        model.save_pretrained(folder / "base")
        if others:
            file = folder / "base" / "model.safetensors"
            save_file({**load_file(file), **others}, file, metadata={"format": "pt"})
        model, info = model_class.from_pretrained(folder / "base", dtype=torch.float32, output_loading_info=True)
    except Exception as cause:
        raise UnbuiltError(f"transformers cannot save and load it: {type(cause).__name__}: {cause}") from cause
    made = Made(model_class=model_class, folder=folder, inputs=None, problem="", reported=_reported(info))
    model.eval()
    try:
        inputs = inputs_of(model)
        made.alone = outputs_of(model, inputs)
        made.inputs = inputs
    except Exception as cause:  # what a model wants to be given is its own business
        made.problem = f"{type(cause).__name__}: {cause}"
    try:
        wrapped = adapt(model)
        if made.inputs:
            made.expected = outputs_of(wrapped, made.inputs)
        merged = wrapped.merge_and_unload()
        if made.inputs:
            made.by_peft = outputs_of(merged, made.inputs)
    except Exception as cause:
        raise UnbuiltError(f"peft cannot adapt, run and merge it: {type(cause).__name__}: {cause}") from cause
    made.weights = {name: parameter.detach().clone() for name, parameter in merged.named_parameters()}
    return made


def built(architecture: Architecture) -> Any:
    """A tiny model with random weights, float32.

    Raises:
        UnbuiltError: transformers cannot build it, or only in its full size.
    """
    model_class = architecture.model_class
    torch.manual_seed(0)
    try:
        config = tiny_config(architecture.model_type)
        # As AutoModelForCausalLM does: a class of the text model takes the config of the text model.
        if not isinstance(config, model_class.config_class):
            config = config.decoder if hasattr(config, "decoder") else config.get_text_config()
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in model_class(deepcopy(config)).parameters())
        if size > MOST_PARAMETERS:
            raise ValueError(f"{size / 1e6:.0f} million parameters, which its config does not make fewer")
        model = model_class(config).float().eval()
    except Exception as cause:
        raise UnbuiltError(f"transformers cannot build it: {type(cause).__name__}: {cause}") from cause
    fill(model)
    return model


def fill(model: Any) -> None:
    """Give values to parameters that a class leaves empty or zero, where a test could not see them."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not bool(parameter.isfinite().all() and parameter.any()):
                parameter.normal_(std=0.02)


def largest_distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest relative distance of two models' outputs."""
    distances = [0.0]
    for name, values in other.items():
        if not torch.equal(one[name], values):
            distances.append(stock.distance(one[name], values))
    return max(distances)


def _skip_list(out: Path) -> list[str] | None:
    config = json.loads((out / "config.json").read_text())
    skip: list[str] | None = config["quantization_config"].get("llm_int8_skip_modules")
    return skip


def _reported(info: dict[str, Any]) -> set[str]:
    return {str(key) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]}
