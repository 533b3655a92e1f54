"""What a model in training is: the base that it was loaded from, and how that was quantized."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qmerge.adapters.reading.training_folder import quantized_by_bitsandbytes
from qmerge.errors import RecipeError, listed
from qmerge.recipe import TrainedOn


@dataclass(frozen=True)
class TrainedModel:
    """A PEFT model in memory.

    peft_model  the model itself, without wrappers for several GPUs
    adapter     name of the adapter that is trained
    base        folder or Hub id that it was loaded from
    revision    of the base on the Hub
    trained_on  how the base was quantized while it was loaded; None where it was not, or is stored so
    """

    peft_model: Any
    adapter: str
    base: str
    revision: str | None
    trained_on: TrainedOn | None


def trained_model(model: Any) -> TrainedModel:
    """Read base and quantization from a PEFT model.

    Raises:
        RecipeError: it has no adapter, more than one active one, or does not say what it was loaded from.
    """
    from accelerate.utils import extract_model_from_parallel

    model = extract_model_from_parallel(model)
    configs = getattr(model, "peft_config", None)
    if not configs or not hasattr(model, "get_base_model"):
        raise RecipeError(
            f"QmergeCallback: the model that is trained ({type(model).__name__}) has no adapter, so there is nothing to merge; "
            f"give the trainer a peft_config"
        )
    active = list(model.active_adapters)
    if len(active) != 1:
        raise RecipeError(
            f"QmergeCallback: {len(active)} adapters are active ({listed(active) or 'none'}), expected the one that is trained: "
            f"choose it with model.set_adapter(NAME)"
        )
    config = configs[active[0]]
    if not config.base_model_name_or_path:
        raise RecipeError("QmergeCallback: the adapter does not say which base it is trained on; give base=…")
    return TrainedModel(
        peft_model=model,
        adapter=str(active[0]),
        base=str(config.base_model_name_or_path),
        revision=config.revision,
        trained_on=_trained_on(model.get_base_model()),
    )


def _trained_on(base: Any) -> TrainedOn | None:
    """How bitsandbytes quantized a base while transformers loaded it; None where it did not, or the files hold it so."""
    # transformers keeps what it quantized with, and whether the files were quantized already.
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is None or quantizer.pre_quantized:
        return None
    config = quantizer.quantization_config
    if getattr(config, "load_in_8bit", False):
        return quantized_by_bitsandbytes(8, None, None)
    if not getattr(config, "load_in_4bit", False):
        return None
    return quantized_by_bitsandbytes(4, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)


def adapter_folder(trained: TrainedModel, folder: Path) -> Path:
    """Where peft saves the adapter if it is given this folder: one that is not called ``default`` has a folder in it."""
    return folder if trained.adapter == "default" else folder / trained.adapter


def save_adapter(trained: TrainedModel, folder: Path, processing_class: Any) -> None:
    """Save adapter and tokenizer as ``trainer.save_model`` does, but of several adapters only the one that is trained.

    Args:
        folder: what ``adapter_folder`` is given.
        processing_class: the trainer's tokenizer or processor; None where it has none.
    """
    trained.peft_model.save_pretrained(folder, selected_adapters=[trained.adapter])
    if processing_class is not None:
        processing_class.save_pretrained(adapter_folder(trained, folder))
