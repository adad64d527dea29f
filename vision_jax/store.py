"""A run's folder in an object store: gs://BUCKET/FOLDER, s3://BUCKET/FOLDER, az:// and file://.

A run trains in its workdir, on a disk. A thread copies each complete checkpoint to the store, and
what else the run has written; a machine that is new fetches it from there and goes on. In the store
a checkpoint is complete when its checksums.json is there, which is written last and removed first.

One run at a time writes to a folder: an object `owner.json` names it, and is written again as long
as it lives. The package obstore (extra `store`) speaks to all of these, with each one's usual
credentials.
"""

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from vision_jax.checksums import CHECKSUMS_FILE
from vision_jax.errors import UserError
from vision_jax.files import DRAFT, draft_folder

CHECKPOINTS, FROZEN = "checkpoints", "frozen"
OWNER = "owner.json"
RECORDS = ("config.json", "model.json")  # by which a run is known
NOT_COPIED = ("lock", OWNER)
SECONDS_BETWEEN_LOOKS = 2.0  # for new checkpoints
SECONDS_BETWEEN_BEATS = 10.0  # of an owner
GONE = 40.0  # seconds without a beat, after which an owner is gone
SETTLE = 1.0  # seconds, in which two that waited for the same owner see each other
LAST = 120.0  # seconds for the last copy
RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=30)}
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
        if url.startswith("file://"):
            return from_url(url, mkdir=True, automatic_cleanup=True)
        return from_url(url, retry_config=RETRIES)  # type: ignore[call-overload]
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


class Store:
    """A run's folder in a store, which this process owns from now on.

    `fetch` brings what is there, `begin` has a thread copy what is new, `close` ends it.
    """

    def __init__(self, url: str, say: Callable[[str], None]):
        """Takes the folder, and waits for a former owner that may be gone.

        Args:
          url: of the run in the store.
          say: prints a line, from any thread.

        Raises:
          UserError: another run writes there, or this one may not.
        """
        self.url, self._say = url, say
        self._store = open_store(url)
        self._own = {"host": socket.gethostname(), "pid": os.getpid(), "id": uuid.uuid4().hex}
        self._beats = 0
        self._sent: dict[str, tuple[int, int]] = {}  # size and time of change, by name
        self._watched: tuple[Path, Callable[[Path], list[int]]] | None = None
        self._wanted, self._ends = threading.Event(), False
        self._failure, self._taken = "", ""
        self._over = threading.Event()  # of beating
        self._beating = threading.Lock()
        try:
            self._take()
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"config.store {url} can't be written: {_first_line(error)}") from error
        # Two threads: to copy a checkpoint may take longer than GONE.
        self._pulse = threading.Thread(target=self._beat_on, name="store's owner", daemon=True)
        self._thread = threading.Thread(target=self._run, name="store", daemon=True)
        self._pulse.start()
        self._thread.start()

    # Whose it is.

    def _take(self) -> None:
        import obstore
        from obstore.exceptions import AlreadyExistsError

        before = self._owner()
        if before is not None and not self._gave_up(before):
            obstore.put(self._store, OWNER, self._beat())
            time.sleep(SETTLE)
        else:
            try:
                obstore.put(self._store, OWNER, self._beat(), mode="create")
            except AlreadyExistsError:
                raise self._in_use(self._owner() or {}) from None
        if (now := self._owner()) is None or now.get("id") != self._own["id"]:
            raise self._in_use(now or {})

    def _gave_up(self, owner: dict[str, Any]) -> bool:
        """Waits until an owner is gone; whether it has given the folder up, else it is dead.

        Raises:
          UserError: it lives, or another one has come.
        """
        if owner.get("host") == self._own["host"] and not _lives(owner.get("pid")):
            return False
        self._say(f"{self.url} was written by a run on {owner.get('host')}: waiting whether it is")
        end = time.monotonic() + GONE
        while time.monotonic() < end:
            time.sleep(min(1.0, GONE / 4))
            now = self._owner()
            if now is None:
                return True
            if now != owner:
                raise self._in_use(now)
        return False

    def _in_use(self, owner: dict[str, Any]) -> UserError:
        return UserError(
            f"config.store {self.url} is in use: a run on {owner.get('host')} writes there. Wait "
            "until that one ends, stop it, or give this one another folder"
        )

    def _owner(self) -> dict[str, Any] | None:
        import obstore

        try:
            found = json.loads(bytes(obstore.get(self._store, OWNER).bytes())[:10_000])
        except FileNotFoundError:
            return None
        except ValueError:
            return {"host": "?"}
        return found if isinstance(found, dict) else {"host": "?"}

    def _beat(self) -> bytes:
        self._beats += 1
        return json.dumps({**self._own, "beats": self._beats}).encode()

    # From the store.

    def fetch(
        self, workdir: Path, last: int | None, check: Callable[[Path, int | None], object]
    ) -> list[str]:
        """Brings a run that the store has further than the workdir into the workdir.

        Args:
          workdir: that is locked; it may be empty.
          last: the newest complete step there.
          check: of (a folder with the RECORDS of the run in the store, its newest step): raises
            UserError if it is another run.

        Returns:
          What the user should know.

        Raises:
          UserError: it is another run, or the store can't be read.
        """
        try:
            names = {n: size for n, size in _list(self._store).items() if n not in NOT_COPIED}
            steps = _steps(names)
            with draft_folder(workdir / "fetched") as draft:
                for name in names.keys() & set(RECORDS):
                    self._download(name, draft / name)
                try:
                    check(draft, steps[-1] if steps else None)
                except UserError as error:
                    raise UserError(str(error).replace(str(draft), self.url)) from error
                if not steps or (last is not None and steps[-1] <= last):
                    return []
                size, free = sum(names.values()), shutil.disk_usage(workdir).free
                if size > free:
                    raise UserError(
                        f"{workdir}: {self.url} has {size:,} bytes, {free:,} are free: make room"
                    )
                whole = {f"{CHECKPOINTS}/{step}" for step in steps}
                for name in names:
                    place = PurePosixPath(name)
                    part = place.parts[0] == CHECKPOINTS and "/".join(place.parts[:2]) not in whole
                    if not part and not place.name.endswith(DRAFT):  # else it was being written
                        self._download(name, draft.joinpath(*place.parts))
                _move(draft, workdir)
        except UserError:
            raise
        except OSError as error:
            reason = error.strerror or _first_line(error)
            raise UserError(f"{workdir}: {reason}, fetching from {self.url}") from error
        except Exception as error:
            raise UserError(
                f"config.store {self.url} can't be read: {_first_line(error)}"
            ) from error
        return [
            f"the checkpoints of step {', '.join(map(str, steps))} were fetched from {self.url}"
        ]

    def _download(self, name: str, path: Path) -> None:
        import obstore

        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for piece in obstore.get(self._store, name).stream(min_chunk_size=PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())

    # To the store.

    def begin(self, workdir: Path, steps: Callable[[Path], list[int]]) -> None:
        """From now on each complete checkpoint of the workdir is copied, as `steps` names them."""
        self._watched = (workdir, steps)

    def close(self) -> None:
        """Copies all that has changed, and gives the folder up; says what could not be copied."""
        self._ends = True
        self._wanted.set()
        self._thread.join(LAST + GONE)
        if self._thread.is_alive() or self._failure:
            self._say(f"warning: {self.url} lacks what was written last; the workdir has all of it")

    def _run(self) -> None:
        import obstore

        copied: set[int] = set()
        deadline = 0.0
        while True:
            self._wanted.wait(SECONDS_BETWEEN_LOOKS)
            self._wanted.clear()
            if (ends := self._ends) and not deadline:
                deadline = time.monotonic() + LAST
            whole = True
            try:
                if ends:
                    self._stay()
                if self._watched is not None:
                    workdir, find = self._watched
                    steps = set(find(workdir))
                    if steps != copied or ends:
                        whole = self._copy(workdir, steps)
                        copied = steps if whole else copied
                self._check_taken()
                self._failure = ""
            except _TakenError as error:
                self._over.set()
                self._fail(str(error))
                return
            except Exception as error:  # tried again at the next look
                self._fail(f"the run is not copied to {self.url}: {_first_line(error)}")
            late = time.monotonic() > deadline
            if ends and ((whole and not self._failure) or late):
                if not whole:
                    self._fail(f"files of the run went while they were copied to {self.url}")
                self._over.set()
                self._pulse.join(GONE)
                with contextlib.suppress(Exception):  # else it is gone when it has not beaten long
                    obstore.delete(self._store, OWNER)
                return

    def _beat_on(self) -> None:
        """Says that the owner lives, until it is over or another one has the folder."""
        while not self._over.wait(SECONDS_BETWEEN_BEATS):
            try:
                self._stay()
            except _TakenError as error:
                self._taken = str(error)
                self._wanted.set()
                return
            except Exception:  # tried again; copies say what is wrong with the store
                continue

    def _check_taken(self) -> None:
        if self._taken:
            raise _TakenError(self._taken)

    def _fail(self, text: str) -> None:
        if text != self._failure:
            self._say(f"warning: {text}")
        self._failure = text

    def _stay(self) -> None:
        import obstore

        with self._beating:
            now = self._owner()
            if now is not None and now.get("id") != self._own["id"]:
                raise _TakenError(f"{self.url} is another run's now, on {now.get('host')}")
            obstore.put(self._store, OWNER, self._beat())

    def _copy(self, workdir: Path, steps: set[int]) -> bool:
        """Whether all of these checkpoints were still there."""
        import obstore

        try:
            names = sorted(_names(workdir, steps))
        except FileNotFoundError:  # a newer checkpoint replaces one
            self._wanted.set()
            return False
        # What a checkpoint needs is there before its checksums, which make it one.
        names.sort(key=lambda name: (name.startswith(CHECKPOINTS), name.endswith(CHECKSUMS_FILE)))
        for name in names:
            self._check_taken()
            path = workdir / name
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

    def _remove(self, steps: set[int]) -> None:
        """Checkpoints that are not here any more, once a newer one is there."""
        import obstore

        names = _list(self._store)
        if not steps & set(_steps(names)):
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


class _TakenError(Exception):
    """Another run has taken the folder over while this one could not reach the store."""


def _lives(pid: Any) -> bool:
    if type(pid) is not int or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _names(workdir: Path, steps: set[int]) -> Iterable[str]:
    """Files of the workdir, and of its checkpoints the complete ones'."""
    for path in workdir.rglob("*"):
        place = path.relative_to(workdir)
        first = place.parts[0]
        hidden = any(part.startswith(".") or part.endswith(DRAFT) for part in place.parts)
        if hidden or first in NOT_COPIED or first.startswith(f"{FROZEN}.") or not path.is_file():
            continue
        if first == CHECKPOINTS:
            step = place.parts[1]
            if not step.isdecimal() or int(step) not in steps:
                continue
        yield place.as_posix()


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
