"""Patches: the difference between a base and a merged folder as one small file. Each folder restores the other one, byte
for byte. ``make.py`` writes a patch from two folders, ``direct.py`` at the end of a merge; ``restore.py`` uses it.
"""

from qmerge.patch.make import Summary, make_patch
from qmerge.patch.restore import Restored, apply_patch, unmerge

__all__ = ["Restored", "Summary", "apply_patch", "make_patch", "unmerge"]
