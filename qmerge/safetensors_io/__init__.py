"""safetensors files: headers, reading parts of them, and streaming them out."""
