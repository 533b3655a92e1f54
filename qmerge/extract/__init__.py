"""MERGED − BASE → a stock PEFT LoRA: the best fit of a given rank to every linear layer, and what it loses.

    delta = merged − base = U S Vᵀ        A = √S Vᵀ, B = U √S of the largest singular values

By Eckart and Young no other B A of that rank is closer to the delta. Both checkpoints may be stored in any format that is
read here; one weight is in memory at a time, in float32.

``anatomy.py`` pairs the weights of the two and subtracts them, ``decompose.py`` makes factors of a delta and counts what they
keep, ``adapter.py`` holds the factors until they are all known, and makes the config; ``work.py`` walks over the weights and writes
the folder; ``face.py`` is what a user is told.
"""

from qmerge.extract.views import Extraction, show
from qmerge.extract.work import extract

__all__ = ["Extraction", "extract", "show"]
