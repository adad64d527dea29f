"""Checkpoints of a run: what training changes, with the data's position, and once what is frozen.

    WORKDIR/frozen/             the frozen parameters, written once
    WORKDIR/checkpoints/STEP/   the train state and the data iterator, asynchronously

Orbax writes each directory under another name and renames it when it is complete, so a kill at any
moment leaves the last complete step usable.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vision_jax.errors import UserError
from vision_jax.steps import TrainState
from vision_jax.trees import paths


class Checkpoints:
    """The checkpoints of one workdir; keeps the last and the best by `best_metric`."""

    def __init__(self, workdir: Path, best_metric: str, *, read_only: bool = False):
        """Opens WORKDIR/checkpoints; `best_metric` is a key of `save`'s metrics.

        Without `read_only` the directory is made, and what a killed run left half written removed.
        """
        self.directory = (workdir / "checkpoints").absolute()
        self.frozen = (workdir / "frozen").absolute()

        def measure(metrics: dict[str, float]) -> float:
            return metrics[best_metric]

        best = checkpoint_managers.BestN(
            get_metric_fn=measure, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=measure,
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(1), best]
            ),
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        with _damage_errors(self.directory), _disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def last_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The complete step with the highest metric, or None."""
        return self._manager.best_step()

    def save(
        self, step: int, state: Any, data: grain.DatasetIterator, metrics: dict[str, float] | None
    ) -> None:
        """Starts writing `state` and the position of `data`; returns once the arrays are copied."""
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), data=grain.checkpoint.CheckpointSave(data)
        )
        with _disk_errors(self.directory):
            self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def restore(self, step: int, target: Any) -> Any:
        """The state at `step` with the shapes and shardings of `target` (ShapeDtypeStructs)."""
        with _damage_errors(self.directory / str(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
        return restored["state"]

    def restore_data(self, step: int, data: grain.DatasetIterator) -> None:
        """Moves `data` to where it was at `step`."""
        with _damage_errors(self.directory / str(step)):
            self._manager.restore(
                step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(data))
            )

    def save_frozen(self, frozen: dict[str, jax.Array]) -> None:
        """Writes the frozen parameters, whole or not at all, over those of a killed start."""
        if frozen:
            with _disk_errors(self.frozen), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self.frozen, frozen, force=True)

    def restore_frozen(self, target: dict[str, Any]) -> dict[str, jax.Array]:
        """The frozen parameters with the shapes and shardings of `target`."""
        if not target:
            return {}
        with _damage_errors(self.frozen), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self.frozen, target)

    def wait(self) -> None:
        """Blocks until everything that was saved is on the disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases orbax's threads."""
        with _disk_errors(self.directory):
            self._manager.close()


def restore_state(checkpoints: Checkpoints, step: int, target: TrainState) -> TrainState:
    """`checkpoints.restore` of a train state, one of an older version too.

    Versions before 0.2 kept no average of BatchNorm's statistics and evaluated with the last ones:
    in such a checkpoint's state these are the average.
    """
    statistics = paths.flatten(target.model_state)
    if not target.ema or not statistics:
        return checkpoints.restore(step, target)
    directory = checkpoints.directory / str(step)
    with _damage_errors(directory), ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(directory / "state").item_metadata.tree["ema"]
    if statistics.keys() <= saved.keys():
        return checkpoints.restore(step, target)
    _, weights = paths.partition(target.ema, set(statistics))
    state = checkpoints.restore(step, replace(target, ema=weights))
    last = jax.tree.map(jnp.copy, paths.flatten(state.model_state))  # a copy: both are donated
    return replace(state, ema={**state.ema, **last})


def last_complete_step(workdir: Path) -> int | None:
    """The newest complete step in a workdir that may not exist; touches nothing."""
    return max(ocp.utils.checkpoint_steps(workdir / "checkpoints"), default=None)


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turns a failed write, which surfaces as several exceptions, into one line."""
    try:
        yield
    except Exception as error:
        reason = _reason_of_disk(error)
        if reason is None:
            raise
        raise UserError(
            f"cannot write {directory} ({reason}): mend that and run the same command again; the "
            "last complete checkpoint is intact"
        ) from error


def _reason_of_disk(error: BaseException | None) -> str | None:
    """What the operating system said, if it was the operating system: "No space left on device"."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return os.strerror(error.errno)
        if code := re.search(r"os_error_code='(\d+)'|\[OS error (\d+)", str(error)):  # tensorstore
            return os.strerror(int(code[1] or code[2]))
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _damage_errors(directory: Path) -> Iterator[None]:
    """Turns what orbax and tensorstore raise about a damaged checkpoint into one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"checkpoint {directory} is damaged or of another run ({first}): restore it from a "
            "copy, or start in another --workdir"
        ) from error
