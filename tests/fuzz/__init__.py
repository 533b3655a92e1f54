"""Every reader on damaged inputs: it returns, or raises one of qmerge's own errors.

readers      the readers, each with small good inputs
mutations    how an input is damaged
test_readers hypothesis damages them: a few examples each in the fast tests, many in the slow ones
__main__     atheris, where it is installed, searches for inputs that reach other lines: ``python -m tests.fuzz report``
corpus/      inputs that were found before
"""
