"""Two checkpoints → the LoRA between them, in peft's format, and how much of the difference it keeps.

    delta = merged − base = U S Vᵀ        A = √S Vᵀ, B = U √S of the largest singular values

No other product B A of this rank is closer to the delta (Eckart and Young, 1936). One weight at a time is in memory, in
float32.

Read ``work.py`` first. ``modules.py`` knows which modules a model has, ``pairing.py`` pairs the weights of both checkpoints,
``difference.py`` subtracts a pair, ``decompose.py`` makes factors, ``adapter.py`` writes peft's files; ``result.py`` has the
numbers, ``views.py`` shows them.
"""

from qmerge.extract.result import Extraction
from qmerge.extract.views import show
from qmerge.extract.work import extract

__all__ = ["Extraction", "extract", "show"]
