"""Checkpoints of a run: what training changes, and once what is frozen.

    WORKDIR/frozen/             the frozen parameters, written once
    WORKDIR/checkpoints/STEP/   the train state, asynchronously

Orbax writes each directory under another name and renames it when it is complete, so a kill at any
moment leaves the last complete step usable. Before that rename the directory gets the checksums of
its files (checksums.py), which each restore compares. The position of the data is the step itself:
so many batches have been taken.
"""

import asyncio
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint.path import atomicity

from vision_jax import files, processes
from vision_jax.checksums import DamagedFileError, verify_checksums, write_checksums
from vision_jax.errors import UserError
from vision_jax.steps import TrainState
from vision_jax.trees import paths

SET_ASIDE = "damaged"  # folder in the workdir


class Checkpoints:
    """Writes the checkpoints of one workdir; keeps the last and the best by `best_metric`."""

    def __init__(
        self, workdir: Path, best_metric: str, best_is: Literal["highest", "lowest"] = "highest"
    ):
        """Makes WORKDIR/checkpoints, and removes what a killed run left half written there.

        Args:
          workdir: the run's folder.
          best_metric: a key of `save`'s metrics.
          best_is: whether the best one is the highest or the lowest.
        """
        self.directory = (workdir / "checkpoints").absolute()
        self.frozen = (workdir / "frozen").absolute()

        def measure(metrics: dict[str, float]) -> float:
            return metrics[best_metric]

        best = checkpoint_managers.BestN(
            get_metric_fn=measure,
            reverse=best_is == "lowest",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=measure,
            best_mode="max" if best_is == "highest" else "min",
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [checkpoint_managers.LatestN(1), best]
            ),
            cleanup_tmp_directories=True,
            temporary_path_class=_SealedPath,
        )
        with _damage_errors(self.directory), _disk_errors(self.directory):
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    def save(self, step: int, state: Any, metrics: dict[str, float] | None) -> None:
        """Starts writing `state`; returns once the arrays are copied."""
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state))
        with _disk_errors(self.directory):
            self._manager.save(step, args=arguments, metrics=metrics, force=True)

    def save_frozen(self, frozen: dict[str, jax.Array]) -> None:
        """Writes the frozen parameters, whole or not at all, over those of a killed start."""
        if frozen:
            with (
                _disk_errors(self.frozen),
                ocp.StandardCheckpointer(temporary_path_class=_SealedPath) as checkpointer,
            ):
                checkpointer.save(self.frozen, frozen, force=True)

    def check(self) -> None:
        """Raises what has gone wrong in the background, without waiting.

        Raises:
          UserError: the last checkpoint could not be written.
        """
        with _disk_errors(self.directory):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Blocks until everything that was saved is on the disk."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases orbax's threads."""
        with _disk_errors(self.directory):
            self._manager.close()


class _SealedPath(atomicity.AtomicRenameTemporaryPath):
    """A directory that gets the checksums of all its files before the rename that completes it.

    Orbax finalizes in a thread of its own, so training goes on meanwhile.
    """

    async def finalize(self) -> None:
        if store := vars(self)["_checkpoint_metadata_store"]:
            await asyncio.to_thread(store.wait_until_finished)
            self._checkpoint_metadata_store = None  # would write once more, after the checksums
        folder = Path(self.get())
        # As the base class writes it, once more.
        committed = f"Checkpoint commit was successful to {self._final_path}"
        (folder / atomicity.COMMIT_SUCCESS_FILE).write_text(committed)
        if atomicity.TMP_DIR_SUFFIX not in folder.parent.name:  # else it is a part of such a one
            await asyncio.to_thread(write_checksums, folder)
        await super().finalize()


# Reading ----------------------------------------------------------------------------------------


def complete_steps(workdir: Path) -> list[int]:
    """The complete steps in a workdir that may not exist, oldest first; touches nothing."""
    return sorted(ocp.utils.checkpoint_steps(workdir / "checkpoints"))


def last_complete_step(workdir: Path) -> int | None:
    """The newest of them, or None."""
    return max(complete_steps(workdir), default=None)


def best_step(
    workdir: Path, best_metric: str, best_is: Literal["highest", "lowest"] = "highest"
) -> int | None:
    """The complete step whose metric is the highest or lowest, the later of equal ones; or None."""
    measured = {step: _metrics(workdir, step).get(best_metric) for step in complete_steps(workdir)}
    known = {step: value for step, value in measured.items() if isinstance(value, int | float)}
    sign = 1 if best_is == "highest" else -1
    return max(known, key=lambda step: (sign * known[step], step), default=None)


def _metrics(workdir: Path, step: int) -> dict[str, Any]:
    folder = workdir / "checkpoints" / str(step)
    with _damage_errors(folder.absolute()):
        verify_checksums(folder, only="metrics/")
        path = folder / "metrics" / "metrics"
        return dict(json.loads(files.read_bytes(path))) if path.is_file() else {}


def restore(workdir: Path, step: int, target: Any) -> tuple[Any, list[str]]:
    """A checkpoint's state, and what its user should know.

    Args:
      workdir: the run's folder.
      step: one of `complete_steps`.
      target: ShapeDtypeStructs with shardings.

    Raises:
      UserError: it is damaged, or of other shapes.
    """
    folder = (workdir / "checkpoints" / str(step)).absolute()
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(target))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored, notes = _restore(folder, lambda: checkpointer.restore(folder, args=arguments))
    return restored["state"], notes


def restore_frozen(workdir: Path, target: dict[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    """(frozen parameters by path, notes for the log); `target` has the ShapeDtypeStructs.

    Raises:
      UserError: they are damaged, or of other shapes.
    """
    if not target:
        return {}, []
    folder = (workdir / "frozen").absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        return _restore(folder, lambda: checkpointer.restore(folder, target))


def _restore(folder: Path, read: Any) -> tuple[Any, list[str]]:
    """Compares checksums, each process of its part of the files, and calls `read()`.

    All processes find the same, so none waits in orbax for one that has found damage.
    """

    def verify() -> bool:
        with _damage_errors(folder):
            return verify_checksums(folder, part=jax.process_index(), parts=jax.process_count())

    sealed = processes.together(verify)
    with _damage_errors(folder):
        restored = read()
    note = f"{folder} is of an older version, without checksums: damage would go unnoticed"
    return restored, [] if sealed else [note]


def restore_state(workdir: Path, step: int, target: Any) -> tuple[Any, list[str]]:
    """`restore` of a train state, one of an older version too.

    Versions before 0.2 kept no average of BatchNorm's statistics and evaluated with the last ones:
    in such a checkpoint's state these are the average.
    """
    if not isinstance(target, TrainState) or not target.ema:
        return restore(workdir, step, target)
    statistics = paths.flatten(target.model_state).keys() & target.ema.keys()
    if not statistics:
        return restore(workdir, step, target)
    folder = (workdir / "checkpoints" / str(step)).absolute()
    with _damage_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder / "state").item_metadata.tree["ema"]
    if statistics <= saved.keys():
        return restore(workdir, step, target)
    _, weights = paths.partition(target.ema, statistics)
    state, notes = restore(workdir, step, replace(target, ema=weights))
    last = jax.tree.map(jnp.copy, paths.flatten(state.model_state))  # a copy: both are donated
    return replace(state, ema={**state.ema, **last}), notes


def restore_newest(workdir: Path, target: Any) -> tuple[int, Any, list[str]]:
    """The newest whole checkpoint: its step, its state, and what its user should know.

    A damaged one is passed over where there is an older one that is whole. Training may go on
    meanwhile, and remove what it has replaced.

    Raises:
      UserError: no complete checkpoint, or none that is whole.
    """
    first: UserError | None = None
    notes: list[str] = []
    tried: set[int] = set()
    while left := set(complete_steps(workdir)) - tried:
        step = max(left)
        tried.add(step)
        try:
            state, said = restore_state(workdir, step, target)
        except UserError as error:
            steps = complete_steps(workdir)
            if step in steps and max(steps) == max(tried):  # else training has replaced it
                first = first or error
                notes.append(str(error))
            continue
        if notes:
            said = [*notes, f"step {step} is whole and is taken instead", *said]
        return step, state, said
    raise first or UserError(f"{workdir} has no complete checkpoint yet: train first")


def set_aside(workdir: Path, step: int) -> list[str]:
    """Moves damaged checkpoints out of the way of new ones, to WORKDIR/damaged.

    Args:
      workdir: the run's folder.
      step: that was restored; all later ones are damaged, and so are those whose metrics are.

    Returns:
      Where each of them is now.
    """
    notes = []
    for other in complete_steps(workdir):
        try:
            _metrics(workdir, other)
            whole = other <= step
        except UserError:
            whole = False
        if not whole:
            folder = workdir / SET_ASIDE
            folder.mkdir(exist_ok=True)
            name = next(n for n in _names(str(other)) if not (folder / n).exists())
            shutil.move(workdir / "checkpoints" / str(other), folder / name)
            notes.append(f"the damaged checkpoint of step {other} is kept in {folder / name}")
    return notes


def _names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}.{number}" for number in range(1, 10_000))


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
    except DamagedFileError as error:
        raise UserError(
            f"checkpoint {directory} is damaged ({error}): restore it from a copy, or start in "
            "another --workdir"
        ) from error
    except (UserError, jax.errors.JaxRuntimeError):  # the latter of a device, or of other processes
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"checkpoint {directory} is damaged or of another run ({first}): restore it from a "
            "copy, or start in another --workdir"
        ) from error
