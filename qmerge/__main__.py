"""``python -m qmerge`` is the command line."""

from qmerge.cli import main

main()
