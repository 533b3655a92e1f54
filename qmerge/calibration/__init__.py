"""The inputs of every weight in the unmerged adapter model, on a calibration text.

texts, generate                          token ids: from a text, random, or written by the model itself
tasks                                    what models do, and how each kind runs on token ids
layered, forward, layerwise_run          a model that runs with one decoder layer in memory
whole                                    a model that is in memory as a whole
scores                                   how the base, the unmerged and the merged model predict the text
statistics, capture, sums, unmerged      the walk over the layers, and the sums that ``preserve`` needs
"""
