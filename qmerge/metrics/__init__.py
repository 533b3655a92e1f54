"""Numbers about one merged weight, one file each.

A plug-in defines ``sums(comparison) -> {name: Tensor or float}``, which add up over row blocks (and, where it makes
sense, over weights), and ``value(sums) -> float | None``. Its docstring's
first line is its help text. None means that the number does not exist (a delta of zero).
"""
