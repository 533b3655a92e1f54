"""The inputs of every weight in the unmerged adapter model, on a calibration text.

texts, generate                          token ids: from a text, random, or written by the model itself
layered, forward, layerwise_run          a model that runs with one decoder layer in memory
scores                                   how the base, the unmerged and the merged model predict the text
statistics, capture, sums, unmerged      the walk over the layers, and the sums that ``preserve`` needs
"""
