"""Models on the Hub that are read in part: headers and the ranges that a plan looks at, instead of whole files.

ranges    ranges of one file, by HTTP
folder    a folder with the small files of a model, whose weights stay on the Hub
"""

from qmerge.remote.folder import open_remote

__all__ = ["open_remote"]
