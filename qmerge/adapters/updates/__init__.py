"""How adapters change one weight: the arithmetic, in float32, without files."""
