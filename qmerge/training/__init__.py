"""A merge as the last step of a training with transformers' Trainer or TRL: ``QmergeCallback``."""

from qmerge.training.callback import QmergeCallback

__all__ = ["QmergeCallback"]
