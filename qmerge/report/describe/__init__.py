"""What an adapter, a model or a planned merge is, as data: the JSON of ``qmerge inspect`` and ``qmerge plan``."""
