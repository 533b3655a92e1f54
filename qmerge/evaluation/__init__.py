"""Evaluate a finished model.

fidelity                 the whole model on held-out inputs, next to the base and the unmerged adapter model: layer by layer, …
whole_fidelity           … or, for classifiers, encoders and encoder-decoder models, with three whole models in memory
examples, media          the held-out examples of these models: lines of a text file, images and sound in a folder
verify                   is the folder complete and unchanged?
loaders                  do stock loaders load it, and compute the right outputs …
sample_inputs, stored    … for one small input, next to the values that qmerge reads?
"""
