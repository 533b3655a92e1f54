"""16-bit brain floats: wide range, 8 significant bits; small deltas are rounded away."""

from qmerge.formats._dense import Dense

FORMAT = Dense("bf16", "BF16")
