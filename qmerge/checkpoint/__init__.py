"""Safetensors folders: read headers and tensors, find weights, stream a new checkpoint out, resume."""
