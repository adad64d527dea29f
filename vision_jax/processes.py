"""Several processes of one run: they agree before they begin, and the end of one is told to all.

Each has a supervisor (hosts/), to which it says where it is and why it ends. What they ask each
other goes through JAX's key-value store, which process 0 holds. In a run of one process everything
here returns at once.
"""

import ast
import hashlib
import platform
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax._src import distributed  # the store has no public name

from vision_jax import replicas
from vision_jax.errors import UserError, printable
from vision_jax.hosts import board, supervise
from vision_jax.hosts.board import (
    COMPARE,
    COMPILE,
    DATA,
    EVALUATE,
    READY,
    RESULTS,
    SAVE,
    START,
    STEP,
    WAIT,
)

__all__ = [
    "COMPARE",
    "COMPILE",
    "DATA",
    "EVALUATE",
    "READY",
    "RESULTS",
    "SAVE",
    "START",
    "STEP",
    "WAIT",
]

T = TypeVar("T")

BAD_INPUT = 2  # exit code
PATIENCE_MS = 24 * 3600 * 1000  # for others that are slower; supervisors notice those that ended
HEARTBEAT = 600  # seconds until JAX's service ends everybody: supervisors are sooner
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "ml_collections",
)
OPTIONS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_threefry_partitionable")
_calls = count()  # every process asks in the same order, so numbers name the same question


def _store() -> Any:
    """JAX's client of the key-value store, None in a run of one process."""
    return distributed.global_state.client


def connect(mine: supervise.Mine) -> None:
    """Joins the others, when all are there."""
    address = mine.board.wait_for_address()
    jax.distributed.initialize(
        address, mine.processes, mine.process, heartbeat_timeout_seconds=HEARTBEAT
    )
    _store().key_value_set(f"vision_jax/host/{mine.process}", socket.gethostname())


def at(step: int, phase: int) -> None:
    """Tells this process's supervisor where it is.

    Args:
      step: the update that it works at, counted from 1.
      phase: one of board.py's.
    """
    if (mine := supervise.mine()) is not None:
        mine.board.at(step, phase)


def have_patience(seconds: float) -> None:
    """How long the others wait for this process in a step."""
    if (mine := supervise.mine()) is not None:
        mine.board.have_patience(seconds)


def name(process: int | None = None) -> str:
    """A process's, by default this one's, with its machine's: "process 1 (host)"."""
    number, host = jax.process_index() if process is None else process, socket.gethostname()
    client = _store()
    if process is not None and client is not None:
        host = client.blocking_key_value_get(f"vision_jax/host/{process}", PATIENCE_MS)
    return f"process {number} ({printable(host)})"


def end(text: str, code: int, error: Exception | None = None) -> None:
    """The end of this process's command, well or not.

    Without a text all have come to the same end, and wait for each other here. With one its
    supervisor says the last line, and what stands before it, where it was this process's failure.

    Args:
      text: "error: ..." or a traceback.
      code: exit code: 2 is bad input, 128 + n signal n, before it could save.
      error: whose traceback it is; notes that were added to it come after its own line.
    """
    if not text:
        first_failure("")
        if jax.process_count() > 1:
            # JAX's service is process 0's: if that one left first, it would abort whoever still
            # reads from it. Python's end, where JAX does this too, is not always come to.
            jax.distributed.shutdown()
        return
    lines = text if error is None else "".join(traceback.format_exception_only(error))
    last = lines.strip().splitlines()[-1 if error is None else 0].removeprefix("error: ")
    mine = supervise.mine()
    told = mine is not None and mine.board.read().kind != board.NOTHING
    if mine is not None:
        kind = board.BAD_INPUT if code == BAD_INPUT else board.UNFORESEEN
        mine.board.say(last, board.STOPPED if code > 128 else kind)
    if (code == 1 and not told) or mine is None:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def told() -> Iterator[None]:
    """What fails inside is told to the supervisor at once, before anything is closed."""
    try:
        yield
    except Exception as error:
        if supervise.mine() is not None:
            foreseen = isinstance(error, UserError | OSError)
            text = f"error: {error}" if foreseen else traceback.format_exc()
            end(text, BAD_INPUT if foreseen else 1, None if foreseen else error)
        raise


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
      UserError: the first process's that raised one, which it names.
    """
    if jax.process_count() == 1:
        return check()
    result, text = None, ""
    try:
        result = check()
    except UserError as error:
        text = f"{name()}: {error}"
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
    first = ast.literal_eval(client.blocking_key_value_get(key, PATIENCE_MS))
    differing = ""
    if first != own:
        field = next(one for one in (first | own) if own.get(one) != first.get(one))
        differing = (
            f"{name()} has another {what} than {name(0)}: {field} is "
            f"{_short(own.get(field))} and not {_short(first.get(field))}: start all processes "
            "with the same command and the same files"
        )
    if differing := first_failure(differing):
        raise UserError(differing)


def check_installation() -> None:
    """All processes run the same code, packages and kind of devices.

    Raises:
      UserError: on all of them, with what differs.
    """
    if jax.process_count() == 1:
        return
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    values = {"vision_jax's code (sha256)": digest.hexdigest()[:16]}
    values |= {package: version(package) for package in PACKAGES}
    values["Python"] = platform.python_version()
    values["devices"] = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    for option in OPTIONS:
        values[option] = str(jax.config.values[option])
    check_equal("installation", values)


def check_replicas(step: int, tree: Any, sums: Any) -> None:
    """All copies of replicated arrays are equal.

    Args:
      step: after which they were compared.
      tree: the arrays.
      sums: of replicas.make_compare.

    Raises:
      UserError: on all processes, with the first array that differs and whose copy it is.
    """
    found = replicas.find_difference(tree, sums)
    if found is None:
        return
    array, odd = found
    whose = " and ".join(map(name, odd))
    if len(odd) == 1:
        what = f"{whose} holds another {array} after step {step} than the rest"
    else:
        what = f"{whose} differ in {array} after step {step}"
    raise UserError(
        f"{what}: a device or its memory may be faulty, or a process has strayed; nothing was "
        "saved since they were equal, and the same command resumes there"
    )


def check_finite(batch: Mapping[str, Any], consequence: str) -> None:
    """No process has a batch that is not finite while others have one that is.

    Raises:
      UserError: on all processes, with the array, whose it is, and the consequence.
    """
    if (found := replicas.find_not_finite(batch)) is not None:
        array, odd = found
        raise UserError(f"{' and '.join(map(name, odd))}: {array} is not finite; {consequence}")


def _short(text: str | None) -> str:
    if text is None:
        return "missing"
    return text if len(text) <= 120 else f"{text[:80]} ... {text[-30:]}"
