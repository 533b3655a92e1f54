"""What adapters do to one weight: the arithmetic, in float32, without files."""
