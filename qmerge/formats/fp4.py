"""FP4: 4-bit floats with blockwise scales (bitsandbytes); coarser than NF4 on most weights."""

from qmerge.formats._bnb4bit import Bnb4bit

FORMAT = Bnb4bit("fp4")
