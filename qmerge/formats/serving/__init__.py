"""Programs that serve merged models: which targets each one loads, and the command that starts it.

``PROGRAMS`` is the one table of these facts: the model card, ``plan`` and the documents take them from it.
"""

from qmerge.formats.serving.programs import PACKAGES, PROGRAMS, Program, programs_for

__all__ = ["PACKAGES", "PROGRAMS", "Program", "programs_for"]
