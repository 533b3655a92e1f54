"""Small checkpoints of the other quantized kinds, as their libraries write them, and the values those libraries read back.

Each weight is packed by the library's own code, module by module: whole quantization pipelines take minutes and would choose
other codes, but not another layout. The oracle is the library's own dequantization with float32 scales. One file for each
family: ``write`` makes a checkpoint, ``read`` gives its values.
"""

from .auto_gptq import auto_gptq, auto_gptq_packed, auto_gptq_product
from .folder import make, oracle, quantization_config, read_tensors, values
from .kinds import KINDS, LLAMA, ODD, needs
from .loading import EXACT, LOADABLE, loads
from .mxfp4 import gpt_oss

__all__ = [
    "EXACT",
    "KINDS",
    "LLAMA",
    "LOADABLE",
    "ODD",
    "auto_gptq",
    "auto_gptq_packed",
    "auto_gptq_product",
    "gpt_oss",
    "loads",
    "make",
    "needs",
    "oracle",
    "quantization_config",
    "read_tensors",
    "values",
]
