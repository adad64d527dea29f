"""One reader a format: what files of boxes state, and every problem in them.

The files may be hostile or merely broken. Readers bound what they read, take nothing from outside
the folders that the user named, and go on after a problem, so that all can be shown at once.
"""
