"""Models on disk: find and describe the weights of a checkpoint, know where transformers loads them, write a new one.

scan, fingerprint, replication           which weights a checkpoint has, and which model it is
architecture, conversion, names          which modules and parameters of transformers they become
config, folder, journal                  the folder of a merged model, and how an interrupted run is resumed
"""
