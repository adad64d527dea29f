#!/usr/bin/env bash
# SimpleITK reads two of pydicom's own test files with their bytes mixed: colors of 16 bits that are
# run-length encoded, and a dose of 32 bits in big-endian order. Their twins, of 8 bits and in
# little-endian order, it reads right. The values are plausible, and nothing is said.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q SimpleITK==2.5.7 pydicom==3.0.2 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import pydicom
import SimpleITK as sitk

sitk.ProcessObject.SetGlobalWarningDisplay(False)
folder = Path(pydicom.__file__).parent / "data/test_files"
changed = False
for name, twin in (("SC_rgb_rle_16bit.dcm", "SC_rgb_rle.dcm"), ("rtdose_expb.dcm", "rtdose.dcm")):
    found, same = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folder / one))) for one in (name, twin)
    )
    theirs = pydicom.dcmread(folder / name).pixel_array
    first = {
        "SimpleITK": found.reshape(-1)[:3].tolist(),
        "pydicom": theirs.reshape(-1)[:3].tolist(),
        f"SimpleITK, {twin}": same.reshape(-1)[:3].tolist(),
    }
    print(name, "begins with", first)
    right = theirs.astype(np.float64).reshape(-1)
    ours = found.astype(np.float64).reshape(-1)
    # A dose is scaled by SimpleITK: right values would be a multiple of pydicom's.
    scale = ours.max() / right.max() if "dose" in name else 1.0
    changed |= bool(np.allclose(ours, right * scale, rtol=1e-6))
print("changed" if changed else "as described")
sys.exit(int(changed))
PYTHON
