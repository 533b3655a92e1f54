"""Evaluate a finished model.

fidelity   the whole model on held-out text, next to the base and the unmerged adapter model
verify     is the folder complete and unchanged?
loaders    do stock loaders load it, and compute the right logits?
"""
