"""Weights as float32 values: opened in their format, read in row blocks, before and after a merge; and written."""
