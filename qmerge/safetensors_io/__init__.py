"""safetensors files: ``header`` (strict), ``reader`` (parts of tensors), ``writer`` (a stream, safe against crashes)."""
