"""Evaluate a finished model.

fidelity                 the whole model on held-out inputs, next to the base and the unmerged adapter model: layer by layer, …
whole_fidelity, examples … or, for classifiers, encoders and encoder-decoder models, with three whole models in memory
verify                   is the folder complete and unchanged?
loaders                  do stock loaders load it, and compute the right outputs …
sample_inputs, stored    … for one small input, next to the values that qmerge reads?
"""
