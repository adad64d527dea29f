"""A run's folder in an object store: gs://BUCKET/FOLDER, s3://BUCKET/FOLDER, az:// and file://.

A run trains in its workdir, on a disk. A thread copies each complete checkpoint to the store, and
what else the run has written; a machine that is new fetches it from there and goes on. In the store
a checkpoint is complete when its checksums.json is there, which is written last and removed first.

The package obstore (extra `store`) speaks to all of these, with each one's usual credentials.
"""

import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from vision_jax.checksums import CHECKSUMS_FILE
from vision_jax.errors import UserError
from vision_jax.files import DRAFT, draft_folder

CHECKPOINTS, FROZEN = "checkpoints", "frozen"
LOCAL = ("lock",)  # names that stay here
SECONDS_BETWEEN_LOOKS = 2.0  # for new checkpoints
PIECE = 16 * 2**20  # bytes of a download in memory
SCHEMES = ("gs://", "s3://", "az://", "file://")


def open_store(url: str) -> Any:
    """The store of an address; nothing is asked of it yet.

    Raises:
      UserError: no such kind of store, or obstore is not installed.
    """
    if not url.startswith(SCHEMES):
        raise UserError(f"config.store {url}: it must begin with {', '.join(SCHEMES)}")
    try:
        from obstore.store import from_url
    except ImportError as error:
        raise UserError("config.store needs obstore: pip install 'vision_jax[store]'") from error
    try:
        return from_url(url, mkdir=True) if url.startswith("file://") else from_url(url)
    except Exception as error:
        raise UserError(f"config.store {url}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _list(store: Any) -> dict[str, int]:
    """Bytes by name; names that lead out of a folder are nobody's of ours."""
    import obstore

    found = {one["path"]: one["size"] for page in obstore.list(store) for one in page}
    return {
        name: size
        for name, size in found.items()
        if not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    }


def _steps(names: Iterable[str]) -> list[int]:
    """Of the complete checkpoints among these names, oldest first."""
    parts = [PurePosixPath(name).parts for name in names]
    whole = [p[1] for p in parts if len(p) == 3 and (p[0], p[2]) == (CHECKPOINTS, CHECKSUMS_FILE)]
    return sorted(int(step) for step in whole if step.isdecimal())


# From the store -----------------------------------------------------------------------------------


def fetch(url: str, workdir: Path, last: int | None) -> list[str]:
    """Brings a run that the store has further than the workdir into the workdir.

    Args:
      url: of the run in the store.
      workdir: that is locked; it may be empty.
      last: the newest complete step there.

    Returns:
      What the user should know.

    Raises:
      UserError: the store can't be read.
    """
    store = open_store(url)
    try:
        names = _list(store)
        steps = _steps(names)
        if not steps or (last is not None and steps[-1] <= last):
            return []
        wanted = {f"{CHECKPOINTS}/{step}" for step in steps}
        size, free = sum(names.values()), shutil.disk_usage(workdir).free
        if size > free:
            raise UserError(
                f"{workdir}: {url} has {size:,} bytes, and {free:,} are free: make room"
            )
        with draft_folder(workdir / "fetched") as draft:
            for name in names:
                place = PurePosixPath(name)
                if place.parts[0] == CHECKPOINTS and "/".join(place.parts[:2]) not in wanted:
                    continue  # one that was being written
                if place.name.endswith(DRAFT) or place.parts[0] in LOCAL:
                    continue
                _download(store, name, draft.joinpath(*place.parts))
            _move(draft, workdir)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{workdir}: {error.strerror or error}, fetching from {url}") from error
    except Exception as error:
        raise UserError(f"config.store {url} can't be read: {_first_line(error)}") from error
    return [f"the checkpoints of step {', '.join(map(str, steps))} were fetched from {url}"]


def _download(store: Any, name: str, path: Path) -> None:
    import obstore

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for piece in obstore.get(store, name).stream(min_chunk_size=PIECE):
            file.write(piece)


def _move(draft: Path, workdir: Path) -> None:
    """Puts what was fetched in its place: checkpoints last, each whole."""
    (workdir / CHECKPOINTS).mkdir(exist_ok=True)
    entries = sorted(draft.iterdir(), key=lambda path: path.name == CHECKPOINTS)
    for path in entries:
        inside = sorted(path.iterdir()) if path.name == CHECKPOINTS else [path]
        for one in inside:
            target = workdir / one.relative_to(draft)
            if target.is_dir():
                shutil.rmtree(target)
            one.replace(target)


# To the store -------------------------------------------------------------------------------------


class Mirror:
    """Copies a workdir to a store from a thread of its own; `close` waits for the last copy."""

    def __init__(self, url: str, workdir: Path, steps: Callable[[Path], list[int]]):
        """Begins to watch.

        Args:
          url: of the run in the store.
          workdir: its folder here.
          steps: names the complete checkpoints in it.
        """
        self.url, self._workdir, self._steps = url, workdir, steps
        self._store = open_store(url)
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change, by name
        self._wanted, self._ends = threading.Event(), False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._thread.start()

    def close(self) -> str:
        """Copies all that has changed; what went wrong last, or ""."""
        self._ends = True
        self._wanted.set()
        self._thread.join()
        return self._failure

    def _run(self) -> None:
        copied: set[int] = set()
        ends = False
        while not ends:
            self._wanted.wait(SECONDS_BETWEEN_LOOKS)
            self._wanted.clear()
            ends, steps = self._ends, set(self._steps(self._workdir))
            if steps == copied and not ends:
                continue
            try:
                if self._copy(steps):
                    copied = steps
                self._failure = ""
            except Exception as error:  # tried again at the next look
                self._failure = f"the run could not be copied to {self.url}: {_first_line(error)}"

    def _copy(self, steps: set[int]) -> bool:
        """Whether all of these checkpoints were still there."""
        import obstore

        names = sorted(self._names(steps))
        # What a checkpoint needs is there before its checksums, which make it one.
        names.sort(key=lambda name: (name.startswith(CHECKPOINTS), name.endswith(CHECKSUMS_FILE)))
        for name in names:
            path = self._workdir / name
            try:
                found = path.stat()
                stamp = (found.st_size, found.st_mtime_ns)
                if self._sent.get(name) == stamp:
                    continue
                obstore.put(self._store, name, path)
            except FileNotFoundError:
                if path.exists():  # it is the store's folder that isn't there
                    raise
                self._wanted.set()  # a newer checkpoint has replaced this one
                return False
            self._sent[name] = stamp
        self._remove(steps)
        return True

    def _names(self, steps: set[int]) -> Iterable[str]:
        """Files of the workdir, and of its checkpoints the complete ones'."""
        for path in self._workdir.rglob("*"):
            place = path.relative_to(self._workdir)
            first = place.parts[0]
            hidden = any(part.startswith(".") or part.endswith(DRAFT) for part in place.parts)
            if hidden or first in LOCAL or first.startswith(f"{FROZEN}.") or not path.is_file():
                continue
            if first == CHECKPOINTS:
                step = place.parts[1]
                if not step.isdecimal() or int(step) not in steps:
                    continue
            yield place.as_posix()

    def _remove(self, steps: set[int]) -> None:
        """Checkpoints that are not here any more, once a newer one is there."""
        import obstore

        names = _list(self._store)
        there = set(_steps(names))
        if not steps & there:
            return
        gone = [
            name
            for name in names
            if (parts := PurePosixPath(name).parts)[0] == CHECKPOINTS
            and len(parts) > 2
            and parts[1].isdecimal()
            and int(parts[1]) not in steps
        ]
        for name in sorted(gone, key=lambda name: not name.endswith(f"/{CHECKSUMS_FILE}")):
            obstore.delete(self._store, name)
            self._sent.pop(name, None)
