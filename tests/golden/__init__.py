"""Golden hashes: SHA-256 of what merges of the demo model write, so that no change of a byte goes unnoticed.

    python -m tests.golden               make hashes.json again, after a change that is meant to change bytes
    python -m tests.golden --variants    merge as other processors would, and say which files have other hashes

What is golden must be the same on every processor: merges with ``nearest`` and ``stochastic`` into formats whose scales are the
base's own or follow from the largest values. That is arithmetic value by value, which IEEE 754 fixes, and random numbers that are
made of integers. The only sum is the delta B · A, whose order is that of the BLAS: the demo's adapter is used with its values
cut to a few bits, so that float32 holds these sums exactly.

Not golden are

- ``preserve``: it adds float32 products, in the order of the BLAS (docs/reliability.md says how much that changes);
- formats whose scales are the best of many by a sum of squared errors (GPTQ, AWQ, w4a16, NVFP4, MLX, K-quants, …): the parity
  tests compare those with the formats' own libraries;
- GGUF: its header comes from the installed version of llama.cpp's converter;
- files with versions, dates or paths: ``qmerge.json``, ``qmerge.html``, ``README.md`` and ``qmerge_recipe.yaml``.
"""
