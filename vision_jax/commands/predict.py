"""predict: the predictions of a finished run for each file, as text, in files and as pictures."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vision_jax.data.folders import list_files
from vision_jax.data.sources import IMAGE_SUFFIXES
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.run.restore import restore


def run(
    config: ConfigDict, workdir: Path, checkpoint: str, images: Sequence[str], out: Path | None
) -> int:
    """Predicts; returns the exit code.

    Raises:
      UserError: no images given, or none that can be read.
    """
    names = _image_files(images)
    out = out or workdir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # before any work
        raise UserError(f"--out: {out} can't be a folder ({error.strerror})") from error
    restored = restore(config, workdir, checkpoint)
    restored.run.task.predict(config, names, restored.trained, out)
    return 0


def _image_files(given: Sequence[str]) -> list[str]:
    """The files given, and the images in the folders given, in order; there no hidden ones."""
    if not given:
        raise UserError("predict needs --images=FILE or --images FILE FOLDER ...")
    names: list[str] = []
    for name in map(str, map(expand, given)):
        if Path(name).is_dir():
            inside, _ = list_files(name, IMAGE_SUFFIXES)
            names += [str(Path(name, file)) for file in inside]
        elif Path(name).is_file():
            names.append(name)
        else:
            raise UserError(f"--images: there is no file {name}")
    if not names:
        raise UserError(f"--images: no images in {', '.join(given)}")
    return names
