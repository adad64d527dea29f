#!/usr/bin/env bash
# A tar that macOS packed has a ._NAME beside each file. webdataset skips these at the top of the tar,
# and inside of a folder takes "a/._0001.jpg" for the file "_0001.jpg" of a sample "a/", so that image
# and label, which no longer stand together, come as two samples: one without a label, one without an
# image.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet webdataset==1.0.2
cd "$folder" && "$folder/venv/bin/python" - <<'PYTHON'
import io
import sys
import tarfile

import webdataset

print(f"webdataset {webdataset.__version__}")
found = {}
for place in ("", "./", "a/"):
    with tarfile.open("shard.tar", "w") as tar:
        for name in ("0001.jpg", "0001.cls"):
            for beside in (f"{place}._{name}", f"{place}{name}"):  # as bsdtar orders them
                entry = tarfile.TarInfo(beside)
                entry.size = len(beside)
                tar.addfile(entry, io.BytesIO(beside.encode()))
    samples = [
        sorted(key for key in sample if not key.startswith("__"))
        for sample in webdataset.WebDataset("shard.tar", shardshuffle=False)
    ]
    print(f"files in {place or 'no folder'}: samples of {samples}")
    found[place] = samples
whole = [["cls", "jpg"]]
split = [["_0001.jpg"], ["jpg"], ["_0001.cls"], ["cls"]]
as_seen = found == {"": whole, "./": whole, "a/": split}
print("as seen in November 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
