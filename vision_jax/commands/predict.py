"""predict: what a finished run, or somebody's weights, say of each file: text, files, pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from ml_collections import ConfigDict

from vision_jax import sharding
from vision_jax.config import config_without_file
from vision_jax.data.folders import list_files
from vision_jax.data.sources import IMAGE_SUFFIXES
from vision_jax.data.volumes.source import find_volumes
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.loaded import load, trained_of
from vision_jax.run.restore import restore
from vision_jax.tasks.api import find_task


def run(
    config: ConfigDict | Mapping[str, str],
    workdir: Path | None,
    checkpoint: str,
    images: Sequence[str],
    out: Path | None,
    weights: str | None = None,
) -> int:
    """Predicts; returns the exit code.

    Args:
      config: the run's; with `weights` the fields to set, by dotted name.
      workdir: the run's folder; None with `weights`.
      checkpoint: "last" or "best".
      images: files and folders of them.
      out: where files go; the run's folder, or with `weights` this one.
      weights: instead of a run, as `loaded.load` takes them.

    Raises:
      UserError: no images given, or none that can be read; no such run or weights.
    """
    names = image_files(images)
    out = out or workdir or Path()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # before any work
        raise UserError(f"--out: {out} can't be a folder ({error.strerror})") from error
    if weights:
        _predict_with(weights, cast(Mapping[str, str], config), names, out)
        return 0
    restored = restore(cast(ConfigDict, config), cast(Path, workdir), checkpoint)
    restored.run.task.predict(restored.run.config, names, restored.trained, out)
    return 0


def _predict_with(
    weights: str, overrides: Mapping[str, str], names: Sequence[str], out: Path
) -> None:
    pickles = overrides.get("model.allow_pickle", "").lower() == "true"
    loaded = load(weights, allow_pickle=pickles)
    task = find_task(loaded.family.task)
    config = config_without_file(loaded.family.task, overrides)
    task.predict(config, names, trained_of(loaded, sharding.make_mesh(**config.mesh)), out)


def image_files(given: Sequence[str], command: str = "predict") -> list[str]:
    """The files given, and what lies in the folders given, in order: images, else volumes."""
    if not given:
        raise UserError(f"{command} needs --images=FILE or --images FILE FOLDER ...")
    names: list[str] = []
    for name in map(str, map(expand, given)):
        if Path(name).is_dir():
            inside, _ = list_files(name, IMAGE_SUFFIXES)
            names += [str(Path(name, file)) for file in inside]
            names += [] if inside else map(str, find_volumes(Path(name)))
        elif Path(name).is_file():
            names.append(name)
        else:
            raise UserError(f"--images: there is no file {name}")
    if not names:
        raise UserError(f"--images: no images in {', '.join(given)}")
    return names
