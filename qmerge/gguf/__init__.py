"""A dense model folder → one GGUF file, streamed: ``export`` it; ``model`` is what is in it, ``vocab`` its tokenizer."""
