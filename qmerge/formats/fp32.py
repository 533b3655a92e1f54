"""32-bit floats: exact, twice the size of 16 bits."""

from qmerge.formats._dense import Dense

FORMAT = Dense("fp32", "F32")
