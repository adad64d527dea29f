"""Several processes of one run: they agree before they begin, and the end of one is told to all.

What connects them is JAX's key-value store, which process 0 holds. Without it everything here is a
matter of one process, and returns at once.
"""

import ast
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import count
from typing import Any, NoReturn, TypeVar

import jax
from jax._src import distributed  # the store has no public name

from vision_jax.errors import UserError

T = TypeVar("T")

BAD_INPUT = 2  # exit code
WATCH = "vision_jax watches the other processes"  # a thread
FAILURE = "vision_jax/failure"  # empty when all have come to the same end
PATIENCE_MS = 24 * 3600 * 1000  # for others that are slower; the watch notices those that ended
GRACE = 5.0  # seconds that the store stays open after a failure, for all to read it
_calls = count()  # every process asks in the same order, so numbers name the same question
_ending = threading.Lock()  # taken once: one thread has the last word


def _store() -> Any:
    """JAX's client of the key-value store, None in a run of one process."""
    return distributed.global_state.client


def connect(coordinator: str, processes: int | None, process: int | None) -> None:
    """Joins the others and begins to watch for their failures.

    Args:
      coordinator: HOST:PORT of process 0, or "auto" on Cloud TPU and under Slurm.
      processes: how many there are.
      process: which of them this one is.
    """
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(coordinator, processes, process)
    threading.Thread(target=_watch, args=(_store(),), name=WATCH, daemon=True).start()


def _watch(client: Any) -> None:
    """Ends this process when another one has failed: its main thread may wait for that one."""
    try:
        text = client.blocking_key_value_get(FAILURE, PATIENCE_MS)
    except Exception:
        text = "process 0 has ended: its own output says why"
    if text and _ending.acquire(blocking=False):
        _leave(f"error: {text}", BAD_INPUT)


def end(text: str, code: int) -> None:
    """The end of this process's command, well or not; returns if it was joined to no others.

    With a text the others end too, each with `process N: ...`; if one of them was first, this
    process says what that one said. Without a text they have all come to the same end.
    """
    client = _store()
    if client is None:
        if text:
            print(text, file=sys.stderr)
        return
    if text and "error: " not in text:
        # A collective breaks when another process ends: that one's reason is the reason.
        time.sleep(GRACE)
    if not _ending.acquire(blocking=False):
        time.sleep(4 * GRACE)  # the watch is ending this process
    if not text:
        with suppress(Exception):
            first_failure("")
            if jax.process_index() == 0:
                client.key_value_set(FAILURE, "")
        for thread in threading.enumerate():
            if thread.name == WATCH:
                thread.join()  # no thread may wait for the store when Python ends
        return
    with suppress(Exception):
        last = text.strip().splitlines()[-1].removeprefix("error: ")
        client.key_value_set(FAILURE, f"process {jax.process_index()}: {last}")
    _leave(text, code)


def _leave(text: str, code: int) -> NoReturn:
    """Prints and ends at once; the store's process waits until the others have read the reason."""
    print(text, file=sys.stderr, flush=True)
    client, index = _store(), jax.process_index()
    with suppress(Exception):
        client.key_value_set(f"vision_jax/left/{index}", "")
        deadline = time.monotonic() + GRACE
        for other in range(jax.process_count()) if index == 0 else ():
            left = max(1, int(1000 * (deadline - time.monotonic())))
            client.blocking_key_value_get(f"vision_jax/left/{other}", left)
    if index == 0:
        time.sleep(1)  # those who have read it end now: without the store JAX would abort them
    sys.stdout.flush()
    os._exit(code)


def first_failure(text: str) -> str:
    """The first text that is not empty among those of all processes, or ""."""
    client, size = _store(), jax.process_count()
    if size == 1 or client is None:
        return text
    key = f"vision_jax/said/{next(_calls)}"
    client.key_value_set(f"{key}/{jax.process_index()}", text)
    if jax.process_index() == 0:
        said = (client.blocking_key_value_get(f"{key}/{n}", PATIENCE_MS) for n in range(size))
        client.key_value_set(f"{key}/first", next((one for one in list(said) if one), ""))
    return client.blocking_key_value_get(f"{key}/first", PATIENCE_MS)


def together(check: Callable[[], T]) -> T:
    """`check()`, whose UserError on one process is raised on all.

    Raises:
      UserError: the first process's that raised one.
    """
    result, text = None, ""
    try:
        result = check()
    except UserError as error:
        text = str(error)
    if failure := first_failure(text):
        raise UserError(failure)
    return result  # type: ignore[return-value]


def check_equal(what: str, values: Mapping[str, Any]) -> None:
    """All processes have the same values.

    Args:
      what: the values are, for the message.
      values: by name.

    Raises:
      UserError: on all of them, with the first name that differs.
    """
    client = _store()
    if jax.process_count() == 1 or client is None:
        return
    own = {name: repr(value) for name, value in values.items()}
    key = f"vision_jax/equal/{next(_calls)}"
    if jax.process_index() == 0:
        client.key_value_set(key, repr(own))
    text = client.blocking_key_value_get(key, PATIENCE_MS)
    differing = ""
    if text != repr(own):
        first = ast.literal_eval(text)
        name = next(name for name in sorted(own.keys() | first) if own.get(name) != first.get(name))
        differing = (
            f"process {jax.process_index()} has another {what} than process 0 ({name}: "
            f"{first.get(name)} -> {own.get(name)}): start all processes with the same command "
            "and the same files"
        )
    if differing := first_failure(differing):
        raise UserError(differing)
