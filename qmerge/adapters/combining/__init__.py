"""Several adapters in one model: combined, one after the other, and how they interfere."""
