"""Faces of the measurements, one file each: ``json`` (the data itself), ``terminal``, ``card``, ``html``."""
