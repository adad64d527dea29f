"""Packages of Debian for the fetch scripts, by apt-get and whatever mirrors it is set up for."""

import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path


def download(package: str, folder: Path) -> Path:
    """The file of NAME or NAME=VERSION, in a folder.

    Raises:
      SystemExit: there is no apt-get, or it can't deliver the package.
    """
    if shutil.which("apt-get") is None:
        raise SystemExit(f"no apt-get here: get Debian's {package} and pass --package=FILE.deb")
    command = ["apt-get", "download", package]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    files = list(folder.glob("*.deb"))
    if result.returncode != 0 or not files:
        raise SystemExit(
            f"apt-get could not deliver {package}: run `apt-get update` first, or get the file and"
            f" pass --package=FILE.deb\n{result.stderr.strip()}"
        )
    return files[0]


def unpack(package: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Some files of a .deb, an ar archive whose data.tar has them: {path: content}.

    Raises:
      SystemExit: another file, or one of the files isn't in it.
    """
    content = package.read_bytes()
    if content[:8] != b"!<arch>\n":
        raise SystemExit(f"{package} is no Debian package")
    at = 8
    while at + 60 <= len(content):
        name, size = content[at : at + 16].decode().strip(), int(content[at + 48 : at + 58])
        if name.startswith("data.tar"):
            packed = io.BytesIO(content[at + 60 : at + 60 + size])
            try:
                with tarfile.open(fileobj=packed) as archive:
                    members = {one: archive.extractfile(f"./{one}") for one in names}
                    return {one: member.read() for one, member in members.items() if member}
            except (KeyError, tarfile.TarError) as error:
                raise SystemExit(f"{package}: {error.args[0]}") from error
        at += 60 + size + size % 2
    raise SystemExit(f"{package}: no data in this package")
