"""A run rebuilt from its workdir alone, also while it trains."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
from ml_collections import ConfigDict

from vision_jax import steps
from vision_jax.checkpoints import best_step, restore_frozen, restore_newest, restore_state
from vision_jax.errors import UserError
from vision_jax.run import workdirs
from vision_jax.run.description import load_description, with_merging
from vision_jax.run.parameters import Flat
from vision_jax.run.prepare import Run, prepare
from vision_jax.tasks.api import Trained


@dataclass(frozen=True)
class Restored:
    """A run with the arrays of one of its checkpoints.

    Attributes:
      run: prepared; not to train.
      state: of its last or best step.
      frozen: parameters that were not trained, by path.
    """

    run: Run
    state: steps.TrainState
    frozen: Flat

    @property
    def trained(self) -> Trained:
        """Its model, as tasks use it."""
        return self.run.trained(self.state, self.frozen)


def restore(config: ConfigDict, workdir: Path, checkpoint: str) -> Restored:
    """`read_run`, which says on the error output what its user should know."""

    def warn(notes: Sequence[str]) -> None:
        for note in notes if jax.process_index() == 0 else ():
            print(f"warning: {note}", file=sys.stderr, flush=True)

    warn(workdirs.check_records(workdir))  # first: they may be why the rest fails
    restored, notes = read_run(config, workdir, checkpoint)
    warn(notes)
    return restored


def read_run(config: ConfigDict, workdir: Path, checkpoint: str) -> tuple[Restored, list[str]]:
    """Rebuilds a run.

    Args:
      config: the run's own, from WORKDIR/config.json.
      workdir: the run's folder.
      checkpoint: "last" or "best".

    Returns:
      (the run, what its user should know: a damaged checkpoint that was passed over, say)

    Raises:
      UserError: no run in `workdir`, or no whole checkpoint.
    """
    run = prepare(
        config,
        description=with_merging(config, load_description(workdir / "model.json")),
        adapter=workdirs.kept_adapter(config, workdir),
        training=False,
    )
    if checkpoint == "last":
        _, state, notes = restore_newest(workdir, run.abstract_state)
    else:
        step = best_step(workdir, run.task.best_metric(run.config), run.task.best_is)
        if step is None:
            raise UserError(f"{workdir} has no evaluation yet, and so no best checkpoint")
        state, notes = restore_state(workdir, step, run.abstract_state)
    frozen, of_frozen = restore_frozen(workdir, run.parameters.abstract()[1])
    return Restored(run, state, frozen), [*notes, *of_frozen]
