"""What commands call SOURCE: a run's folder, or weights as `predict --weights` takes them."""

from pathlib import Path
from typing import TYPE_CHECKING

from vision_jax.errors import UserError

if TYPE_CHECKING:
    from vision_jax.loaded import Loaded

RUN_FILE = "config.json"


def is_run(folder: Path) -> bool:
    """Whether it is a run's folder."""
    return (folder / RUN_FILE).is_file()


def load_source(
    source: str, folder: Path, *, checkpoint: str | None, allow_pickle: bool
) -> "Loaded":
    """The model of a source.

    Args:
      source: as it was given.
      folder: the same as a path.
      checkpoint: "last" or "best" of a run, whose adapters stay on the tree then; None for what the
        run ended with, merged.
      allow_pickle: weights may be pickles.

    Raises:
      UserError: no such run or weights; a checkpoint of what is no run.
    """
    from vision_jax.loaded import load, loaded_of

    if not is_run(folder):
        if checkpoint:
            raise UserError(f"--checkpoint is of the folder of a run, and {source} is none")
        return load(source, allow_pickle=allow_pickle)
    if not checkpoint:
        return load(folder)
    from vision_jax.config import load_config
    from vision_jax.run.restore import restore

    config = load_config(str(folder / RUN_FILE), {})
    return loaded_of(restore(config, folder, checkpoint).trained, f"{folder}")
