"""A dense model folder → one GGUF file for llama.cpp. ``export.py`` writes it; ``families.py`` knows the architectures,
``hyperparameters.py``, ``tensors.py`` and ``vocabulary.py`` translate the three parts of a model.
"""
