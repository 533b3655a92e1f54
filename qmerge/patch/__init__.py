"""Reversible merges: what a merged folder has that its base has not, as one small file.

``make.py`` writes it from two folders, ``direct.py`` in the course of a merge, ``restore.py`` gives either folder back from
the other one, byte for byte; ``codec.py`` packs bytes and differences, ``file.py`` is the file itself.
"""

from qmerge.patch.make import Summary, make_patch
from qmerge.patch.restore import Restored, apply_patch, unmerge

__all__ = ["Restored", "Summary", "apply_patch", "make_patch", "unmerge"]
