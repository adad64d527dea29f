"""What commands call SOURCE: a run's folder, or weights as `predict --weights` takes them.

And where they may write what they make of it.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vision_jax.errors import UserError
from vision_jax.files import expand

if TYPE_CHECKING:
    from vision_jax.loaded import Loaded
    from vision_jax.run.prepare import Run

RUN_FILE = "config.json"
MODEL_FILE = (
    "model.json"  # of a run alone: folders in Hugging Face's layout have a config.json, too
)
OTHER = "name another folder"


def is_run(folder: Path) -> bool:
    """Whether it is a run's folder."""
    return (folder / RUN_FILE).is_file() and (folder / MODEL_FILE).is_file()


def check_folder(flag: str, out: Path) -> None:
    """Raises UserError where a flag names no folder, but a file or what would lie below one."""
    there = next((path for path in (out, *out.parents) if path.exists()), out)
    if there.exists() and not there.is_dir():
        raise UserError(f"{flag}: {there} is a file: name a folder")


def check_keeps(flag: str, out: Path, source: Path | None = None) -> None:
    """Refuses a folder where a model's files would replace a run's, or those they are made of.

    Args:
      flag: that names the folder.
      out: the folder.
      source: a folder or file that is only read; it need not be there.

    Raises:
      UserError: see above, or what `check_folder` says.
    """
    check_folder(flag, out)
    if (out / "model.json").is_file() or (out / "checkpoints").is_dir():  # only runs have them
        raise UserError(f"{flag}: {out} is a run's folder, whose model it would replace: {OTHER}")
    if source is not None and source.exists():
        home = source if source.is_dir() else source.parent
        if home.resolve() == out.resolve():
            raise UserError(f"{flag}: {out} holds {source}, which it would replace: {OTHER}")


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


def load_with_run(
    source: str, *, checkpoint: str | None, allow_pickle: bool
) -> tuple["Loaded", "Run | None"]:
    """(the model, adapters still on its tree; its run, if it is one's).

    Args:
      source: a run's folder, or weights.
      checkpoint: "last" or "best" of a run; None is the last.
      allow_pickle: weights may be pickles.

    Raises:
      UserError: no such run or weights; a checkpoint of what is no run.
    """
    from vision_jax.config import load_config
    from vision_jax.loaded import load, loaded_of
    from vision_jax.run.restore import restore

    folder = expand(source)
    if not is_run(folder):
        if checkpoint:
            raise UserError(f"--checkpoint is of the folder of a run, and {source} is none")
        return load(source, allow_pickle=allow_pickle), None
    restored = restore(load_config(str(folder / RUN_FILE), {}), folder, checkpoint or "last")
    return loaded_of(restored.trained, str(folder)), restored.run
