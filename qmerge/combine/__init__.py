"""Ways to make one delta of several adapters' deltas, one file each.

A plug-in defines ``combine(deltas, weights, settings) -> delta``, all float32 [O, I], and ``ROWWISE``: whether rows can be
combined some at a time, so that the weight streams. Its docstring's first line is its help text. Deltas that are
combined are whole products s·B·A: nothing of one adapter's B is ever multiplied with another's A.
"""
