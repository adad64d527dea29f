"""DICOM files for tests: a slice with what it needs and no more, and a series of them."""

from pathlib import Path

import numpy as np
import pydicom


def dicom(path: Path, array: np.ndarray, z: float = 0.0, **values) -> Path:
    """One slice of a series, as little as it needs; a value of None leaves an element out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    own = {
        "SOPClassUID": pydicom.uid.CTImageStorage, "SeriesInstanceUID": "1.2", "InstanceNumber": 1,
        "Rows": array.shape[0], "Columns": array.shape[1], "SamplesPerPixel": 1,
        "BitsAllocated": array.dtype.itemsize * 8, "BitsStored": array.dtype.itemsize * 8,
        "HighBit": array.dtype.itemsize * 8 - 1, "PhotometricInterpretation": "MONOCHROME2",
        "PixelRepresentation": int(array.dtype.kind == "i"), "PixelSpacing": [3.0, 2.0],
        "SliceThickness": 9, "ImagePositionPatient": [-10, -20, z],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "RescaleSlope": 1, "RescaleIntercept": 0,
    }  # fmt: skip
    for key, value in (own | values).items():
        if value is not None:
            setattr(data, key, value)
    if "PixelData" not in values:
        data.PixelData = array.tobytes()
    if array.dtype.itemsize > 1 and "PixelData" in data:
        data["PixelData"].VR = "OW"
    data.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, array: np.ndarray, step: float = 4.0, **values) -> list[Path]:
    """Files of [z, y, x], named against their order."""
    count = len(array)
    return [
        dicom(folder / f"{count - z:03}.dcm", array[z], z * step, InstanceNumber=z + 1, **values)
        for z in range(count)
    ]
