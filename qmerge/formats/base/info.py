"""Facts about a format."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """Facts about a format: how checkpoints declare it, how it is arranged on disk, and what its loaders can do."""

    name: str
    """Name in recipes, flags and reports; the same as the file name of its module."""

    quant_method: str | None = None
    """``quantization_config["quant_method"]`` of models written in this format; None for formats that are not quantized."""

    other_read_methods: tuple[str, ...] = ()
    """Other values of ``quant_method`` in models that hold weights of this format."""

    dense_dtype: str | None = None
    """safetensors dtype of a dense format, whose weights are plain float numbers; None for all others."""

    loaders: str = ""
    """Libraries that load models written in this format, as reports show them; empty for formats that are only read."""

    accepted_options: tuple[str, ...] = ()
    """Recipe options that apply to this target, for example ``group_size``."""

    chosen_by_auto: bool = True
    """Whether ``--target auto`` may choose it: not where only one kind of machine can run the model."""

    row_axis: int = 0
    """Axis of the tensor with the codes along which the rows of the weight follow one another."""

    always_written: tuple[str, ...] = ()
    """Local names of optional tensors that loaders expect: added where the base lacks them."""

    takes_conv1d: bool = False
    """Whether loaders replace GPT-2's Conv1D layers as well as Linear layers."""

    takes_single_experts: bool = False
    """Whether loaders accept quantized experts that are separate on disk and stacked in memory."""

    experts_problem: str = ""
    """Why separate experts are not stored in it, as a sentence; empty where loaders take them."""

    takes_stacks: bool = False
    """Whether it is a format of gpt-oss' experts, stacks [E, I, O] in a dense checkpoint, and of nothing else."""

    quantizes_embeddings: bool = False
    """Whether the format's library quantizes embeddings and the output embedding as well."""

    quantizes_activations: bool = False
    """Whether loaders quantize the activations as well, which no number of qmerge includes."""

    lists_dense: bool = False
    """Whether ``quantization_config`` must list the modules that stay dense, even if the base's config listed them."""

    required_dtype: str | None = None
    """The one dtype that loaders dequantize to, which config.json must then declare (torch's spelling); None: any."""

    container: str | None = None
    """``gguf``: all weights of a model go into one file of that kind, norms and embeddings too. None: safetensors files, with
    those weights that the format's loaders quantize."""

    @property
    def is_quantized(self) -> bool:
        """Whether weights have codes and scales. Neither this nor ``is_dense`` holds for ``raw``."""
        return self.quant_method is not None

    @property
    def is_dense(self) -> bool:
        """Whether weights are plain float numbers."""
        return self.dense_dtype is not None

    @property
    def read_methods(self) -> tuple[str, ...]:
        """All values of ``quant_method`` in models that hold weights of this format."""
        if self.quant_method is None:
            return ()
        return (self.quant_method, *self.other_read_methods)
