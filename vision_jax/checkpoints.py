"""Checkpoints of a run: what training changes, with the data's position, and once what is frozen.

    WORKDIR/frozen/             the frozen parameters, written once
    WORKDIR/checkpoints/STEP/   the train state and the data iterator, asynchronously

Orbax writes each directory under another name and renames it when it is complete, so a kill at any
moment leaves the last complete step usable.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import grain.checkpoint
import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from vision_jax.errors import UserError


class Checkpoints:
    """The checkpoints of one workdir; keeps the last and the best by `best_metric`."""

    def __init__(self, workdir: Path, best_metric: str):
        """Opens, or makes, WORKDIR/checkpoints; `best_metric` is a key of `save`'s metrics."""
        self.directory = (workdir / "checkpoints").absolute()
        self.frozen = (workdir / "frozen").absolute()
        self._best_metric = best_metric
        keep = checkpoint_managers.AnyPreservationPolicy(
            [
                checkpoint_managers.LatestN(1),
                checkpoint_managers.BestN(
                    get_metric_fn=lambda metrics: metrics[best_metric],
                    n=1,
                    keep_checkpoints_without_metrics=False,
                ),
            ]
        )
        with _disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory, options=ocp.CheckpointManagerOptions(preservation_policy=keep)
            )

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
        with _shape_errors(self.directory / str(step)):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
            )
        return restored["state"]

    def restore_data(self, step: int, data: grain.DatasetIterator) -> None:
        """Moves `data` to where it was at `step`."""
        self._manager.restore(
            step, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(data))
        )

    def save_frozen(self, frozen: dict[str, jax.Array]) -> None:
        """Writes the frozen parameters, whole or not at all."""
        if frozen:
            with _disk_errors(self.frozen), ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self.frozen, frozen)

    def has_frozen(self) -> bool:
        """Whether `save_frozen` has finished in this workdir."""
        return (self.frozen).is_dir()

    def restore_frozen(self, target: dict[str, Any]) -> dict[str, jax.Array]:
        """The frozen parameters with the shapes and shardings of `target`."""
        if not target:
            return {}
        with _shape_errors(self.frozen), ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self.frozen, target)

    def wait(self) -> None:
        """Blocks until everything that was saved is on the disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases orbax's threads."""
        with _disk_errors(self.directory):
            self._manager.close()


@contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """Turns a full disk, which surfaces as several exceptions, into one line."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left" in str(error) or "Disk quota exceeded" in str(error):
            raise UserError(
                f"no space left on the disk that holds {directory}: free some and run the same "
                "command again; the last complete checkpoint is intact"
            ) from error
        raise


@contextmanager
def _shape_errors(directory: Path) -> Iterator[None]:
    """Turns orbax's report of a tree that does not fit into one line."""
    try:
        yield
    except (ValueError, KeyError, FileNotFoundError) as error:
        first = str(error).strip().splitlines()[0][:300]
        raise UserError(f"checkpoint {directory} does not fit this run: {first}") from error
