"""robustness: what is left of a finished run under attack, and more that its task tells."""

from pathlib import Path

from ml_collections import ConfigDict

from vision_jax.config import check_ranges, load_config
from vision_jax.run.restore import restore
from vision_jax.tasks.api import Trained


def run(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Writes WORKDIR/robustness.json and .png; returns the exit code.

    Raises:
      UserError: bad input.
    """
    check_ranges(config)

    def restore_other(folder: Path) -> Trained:
        return restore(load_config(str(folder / "config.json"), {}), folder, "last").trained

    restored = restore(config, workdir, checkpoint)
    restored.run.task.robustness(config, workdir, restored.trained, restore_other)
    return 0
