"""16-bit IEEE floats: 11 significant bits, ends at 65504; the best 16-bit target where the range allows."""

from qmerge.formats._dense import Dense

FORMAT = Dense("fp16", "F16")
