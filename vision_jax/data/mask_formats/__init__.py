"""One reader a format: which regions of an image files name, and every problem in them.

As annotation_formats/ reads boxes: bounded, inside the folders that the user named, and on after a
problem, so that all can be shown at once.
"""
