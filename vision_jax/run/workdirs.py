"""A run's folder: one run at a time, its records, and whether another start fits what it holds.

    WORKDIR/lock                  held by the run that trains here
    WORKDIR/config.json           every field
    WORKDIR/model.json            architecture, preprocessing, class names, weights
    WORKDIR/train_data.json.gz    what the training data was (data/fingerprint.py)
    WORKDIR/checksums.json        of these, and of the final model and adapter

checkpoints.py has the rest.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vision_jax.checksums import (
    CHECKSUMS_FILE,
    DamagedFileError,
    changed_files,
    read_checksums,
    save_checksums,
    write_checksums,
)
from vision_jax.config import differences, fields, load_config, save_config, updates_a_step
from vision_jax.convert import peft
from vision_jax.data.fingerprint import Fingerprint, write_fingerprint
from vision_jax.errors import UserError
from vision_jax.files import DRAFT, lock_file
from vision_jax.logging import explain_write_errors
from vision_jax.run.description import Description, save_description
from vision_jax.run.prepare import make_schedule

LOCK_FILE = "lock"
CONFIG_FILE = "config.json"
MODEL_FILE = "model.json"
DATA_FILE = "train_data.json.gz"
ADAPTER_COPY = "initial_adapter"
RECORDS = (CONFIG_FILE, MODEL_FILE, DATA_FILE, f"{ADAPTER_COPY}/")

# Fields that may differ between the run that a workdir holds and the one that continues it: they
# change no update. Of `total_steps` see `_check_length`.
FREE_FIELDS = (
    "mesh.",
    "sharding_rules",
    "hosts.",
    "store:",
    "data.threads",
    "data.workers",
    "data.max_damaged",
    "data.eval:",
    "evaluate.",
    "robustness.",
    "log_every",
    "checkpoint_every",
    "model.remat",
    "model.scan",
    "distill.cache",  # bit-identical with and without
    "latents.cache",  # the same latents wherever they lie
    "latents.max_gb",
)
# What versions before 0.2 left of a file when they were killed.
_OLD_DRAFT = re.compile(r"(adapter_)?model\.safetensors[a-z0-9_]{8}")


# One run at a time -------------------------------------------------------------------------------


class Lock:
    """That a run holds its folder.

    Attributes:
      note: what the user should know, "" for nothing.
      used: whether the folder has become this run's; until then its making is undone.
    """

    note = ""
    used = False


@contextmanager
def locked(workdir: Path) -> Iterator[Lock]:
    """Makes the folder if it isn't there and holds it; the kernel lets go when this process ends.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    lock, path = Lock(), workdir / LOCK_FILE
    made = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    new = not path.exists()
    with explain_write_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor, lock.note = _lock(path)
    try:
        yield lock
    finally:
        if new and not lock.used:  # nothing was begun: the folder is as it was before
            _undo(path, made)
        os.close(descriptor)


def _lock(path: Path) -> tuple[int, str]:
    """(descriptor of the locked file, a note)."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        held = lock_file(descriptor)
        if held is None:
            return descriptor, _no_locks(path)
        if not held:
            os.close(descriptor)
            raise UserError(
                f"{path.parent} is in use: another run trains in it. Wait until that one ends, "
                "stop it, or give this one another --workdir"
            )
        if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
            return descriptor, ""
        os.close(descriptor)  # its owner has just removed it, see `_undo`


def _no_locks(path: Path) -> str:
    return (
        f"the file system of {path.parent} has no locks: nothing but you keeps a second run out of "
        "this folder"
    )


def _undo(path: Path, made: Sequence[Path]) -> None:
    try:
        path.unlink()
        for folder in made:
            folder.rmdir()
    except OSError:  # somebody has put something there
        pass


def remove_drafts(workdir: Path) -> None:
    """Removes what a killed run left half written; only while the lock is held."""
    for folder in (workdir, workdir / "adapter"):
        for path in folder.glob("*") if folder.is_dir() else ():
            if path.is_file() and (path.name.endswith(DRAFT) or _OLD_DRAFT.fullmatch(path.name)):
                path.unlink()


# Records -----------------------------------------------------------------------------------------


@contextmanager
def writing(workdir: Path, *names: str) -> Iterator[None]:
    """While files are written they have no checksums, and from then on those of what was written.

    A name that ends in / stands for what lies in that folder. Without names: of all files.
    """
    try:
        kept = read_checksums(workdir) if names else {}
    except DamagedFileError:
        kept = {}
    kept = {name: value for name, value in kept.items() if not name.startswith(names)}
    if (workdir / CHECKSUMS_FILE).exists():
        save_checksums(kept, workdir)
    yield
    write_checksums(workdir, _expand(workdir, names or RECORDS), kept=kept)


def _expand(workdir: Path, names: Sequence[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        folder = workdir / name
        inside = sorted(folder.iterdir()) if name.endswith("/") and folder.is_dir() else []
        found += [str(path.relative_to(workdir)) for path in inside] if inside else [name]
    return found


def write_records(
    workdir: Path,
    config: ConfigDict,
    held: ConfigDict | None,
    description: Description,
    fingerprint: Fingerprint,
    adapter: Path | None,
) -> None:
    """Writes what a run must remember; of one that goes on the config, if it has changed.

    Args:
      workdir: the run's folder.
      config: of this start.
      held: of the run that goes on; None for one that begins.
      description: of the model.
      fingerprint: of the training data.
      adapter: the folder of the one that the run starts from, to be copied.
    """
    if held is not None:
        if differences(held, config):
            with writing(workdir, CONFIG_FILE):
                save_config(config, workdir / CONFIG_FILE)
        return
    with writing(workdir):
        if adapter is not None:
            _keep_adapter(adapter, workdir)
        write_fingerprint(fingerprint, workdir / DATA_FILE)
        save_description(description, workdir / MODEL_FILE)
        save_config(config, workdir / CONFIG_FILE)


def _keep_adapter(adapter: Path, workdir: Path) -> None:
    """Copies the adapter that a run starts from, so that its workdir needs nothing outside."""
    (workdir / ADAPTER_COPY).mkdir(exist_ok=True)
    for name in (peft.CONFIG_FILE, peft.TENSORS_FILE):
        shutil.copyfile(adapter / name, workdir / ADAPTER_COPY / name)


def kept_adapter(config: ConfigDict, workdir: Path) -> Path | None:
    """That copy, if the run of `config` in the folder started from an adapter."""
    kept = "lora" in config.recipes and config.lora.init_from
    return workdir / ADAPTER_COPY if kept else None


def check_records(workdir: Path) -> list[str]:
    """Warnings about records that are not as the run wrote them.

    No more than that, for whoever changes config.json on purpose.
    """
    try:
        changed = [name for name in changed_files(workdir) if name.startswith(RECORDS)]
    except DamagedFileError as error:
        return [str(error)]
    return [
        f"{workdir / name} is not as the run wrote it: changed by hand, or damaged"
        for name in changed
    ]


# Another start -----------------------------------------------------------------------------------


def read_held(config: ConfigDict, workdir: Path, last: int | None) -> ConfigDict | None:
    """The config of the run that the folder holds and this start continues; None: it begins anew.

    A folder without a complete checkpoint holds nothing that could be mixed up.

    Args:
      config: of this start.
      workdir: the folder.
      last: the newest complete step in it.

    Raises:
      UserError: the folder holds another run, or somebody else's files.
    """
    there = {name for name in (CONFIG_FILE, MODEL_FILE) if (workdir / name).is_file()}
    results = (workdir / "model.safetensors").exists()
    if CONFIG_FILE not in there and (last is not None or results):
        raise UserError(
            f"{workdir} has files that a run would overwrite but no config.json of a run: give "
            "another --workdir"
        )
    if CONFIG_FILE in there and MODEL_FILE not in there:
        raise UserError(
            f"{workdir} has a config.json of another program, or its model.json is missing: give "
            "another --workdir"
        )
    if last is None and not results:
        return None
    held = load_config(str(workdir / CONFIG_FILE), {})
    changed = [
        line
        for line in differences(held, config)
        if not line.startswith((*FREE_FIELDS, "total_steps:"))
    ]
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:3])}): give this one "
            f"another --workdir, where --from={workdir} begins it with that run's weights, or "
            "remove that folder"
        )
    if last is None:
        return None
    _check_length(held, config, workdir, last)
    return held


def _check_length(held: ConfigDict, config: ConfigDict, workdir: Path, last: int) -> None:
    """A run may get another length where the steps that it has made would have been the same."""
    before, now = held.total_steps, config.total_steps
    if before == now:
        return
    text = f"{workdir} holds a run with config.total_steps {before}"
    if now < last:
        raise UserError(f"{text}, of which {last} are done: {now} are too few")
    updates = np.arange(last * updates_a_step(fields(config)))
    ours, theirs = (np.asarray(make_schedule(one)(updates)) for one in (config, held))
    if not np.array_equal(ours, theirs):
        raise UserError(
            f"{text}: with {now} the rates of the {last} steps that are done would have been "
            f"others (schedule {config.optim.schedule}). Give another --workdir, where "
            f"--from={workdir} begins a new run with this one's weights"
        )


def check_origin(start_from: Path | None, recorded: str, workdir: Path) -> None:
    """A run that goes on did begin with what --from names, if it is given again.

    Raises:
      UserError: it began otherwise.
    """
    if start_from is not None and not recorded.startswith(f"{start_from.resolve()}, step "):
        began = f"with {recorded}" if recorded else "without --from"
        raise UserError(
            f"{workdir} holds a run that began {began}, not with {start_from}: give another "
            "--workdir"
        )
