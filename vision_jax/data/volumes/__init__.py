"""Medical volumes and deep images: NIfTI, DICOM and TIFF, with the extra `medical`.

Every volume becomes slices in one orientation, whatever the file's: see volume.py. Sizes are held
to bounds from the headers before anything is allocated, and what can't be read exactly is refused
by name.
"""
