"""What qmerge tells people: the report of a finished run, and what ``inspect`` and ``plan`` find.

``make`` and ``describe/`` compute data; ``terminal/``, ``card`` and ``html`` show it and compute nothing.
"""
