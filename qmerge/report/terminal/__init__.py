"""The terminal: results on stdout; progress, warnings and errors on stderr; at most 80 columns where the names allow it."""
