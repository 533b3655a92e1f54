"""Golden hashes: SHA-256 of what merges of the demo model write, so that no change of a byte goes unnoticed.

    python -m tests.golden              make hashes.json anew, after a change that is meant to change bytes
    python -m tests.golden --variants   make them as other processors would, and say which differ

Only what is the same on every processor is golden. Rounding ``nearest`` and ``stochastic`` onto grids whose scales are largest
values: IEEE arithmetic, entry by entry, and random numbers that are integers. The one sum is the delta B A: the adapter is the demo's, with
its values cut so that these sums are exact in float32 in whatever order a BLAS adds. Not golden are ``preserve`` (it adds float32
products) and formats whose scales are the best by a sum of squared errors (``NOT_GOLDEN``); the tests of parity compare those with
their libraries. Nor are files that hold versions, dates and paths: ``qmerge.json``, ``qmerge.html``, ``README.md`` and the recipe.
"""
