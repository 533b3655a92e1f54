"""NF4: 16 levels at the quantiles of a normal distribution, as QLoRA trains on (bitsandbytes)."""

from qmerge.formats._bnb4bit import Bnb4bit

FORMAT = Bnb4bit("nf4")
