"""Ways to store a weight, one file each. A format serves as base and as target: what was written is read back.

A plug-in defines ``FORMAT``, a ``Format`` (see ``_base.py``), and its docstring's first line is its help text.
"""
