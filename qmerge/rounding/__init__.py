"""Ways to choose codes on a grid, one file each.

A plug-in defines ``choose(values_OI, grid, context) -> codes_OI``; its docstring's first line is its help text.
"""
