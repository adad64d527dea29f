"""A trained model as one file that other programs run, and a certificate of what it computes there.

serving.py makes one function of images to names, boxes or masks; a file beside it writes that
function in each format; certificate.py runs what was written, in a process of its own.
"""
