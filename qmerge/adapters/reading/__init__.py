"""Adapter folders as PEFT saves them: which adapter, which tensors, and which weights on disk they change."""
