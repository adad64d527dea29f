"""A supervisor for each process of a run, so that the end of one is told to all, in one line.

    supervisor 0  <- TCP at --coordinator=HOST:PORT, a JSON object a line ->  supervisor 1, 2, ...
        |  fork, a page of shared memory (board.py)                               |
    process 0     <- JAX: its key-value store, collectives ->                 process 1, 2, ...

A process of JAX's cannot do it alone: once another is lost, JAX's own service aborts it in C++, and
one that was killed says nothing. The supervisor has no JAX. It forwards signals, kills what its
process leaves behind, and ends with an exit code of judge.py. Supervisor 0 also judges.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vision_jax.errors import UserError, printable
from vision_jax.hosts.board import Board
from vision_jax.hosts.link import Hub, Place, Spoke, make_link
from vision_jax.hosts.worker import FORWARDED, Worker, write


@dataclass(frozen=True)
class Mine:
    """A process that has a supervisor.

    Attributes:
      board: what its supervisor reads.
      processes: how many there are.
      process: which of them this one is.
    """

    board: Board
    processes: int
    process: int


_mine: list[Mine] = []


def mine() -> Mine | None:
    """This process, if it has a supervisor."""
    return _mine[0] if _mine else None


def start(place: Place, *, prefixed: bool = False) -> Mine:
    """Forks the processes; returns in each of them.

    The supervisor itself never returns: it ends with its processes.

    Args:
      place: of this supervisor.
      prefixed: each line that a process prints begins with its number.

    Raises:
      UserError: the coordinator's port is taken or its address cannot be used.
    """
    if not hasattr(os, "fork"):
        raise UserError("several processes of one run need Linux or macOS")
    link = make_link(place)
    sys.stdout.flush()
    sys.stderr.flush()
    workers: list[Worker] = []
    for number in range(place.first, place.first + place.count):
        worker = Worker(number, prefixed)
        if worker.fork():
            for other in workers:
                other.forget()
            link.forget()
            _mine.append(Mine(worker.board, place.processes, number))
            return _mine[0]
        workers.append(worker)
    try:
        code = _supervise(workers, link)
    finally:
        for worker in workers:
            worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _supervise(workers: Sequence[Worker], link: "Hub | Spoke") -> int:
    """Until all have ended; returns the exit code."""
    received: list[int] = []
    for one in FORWARDED:
        signal.signal(one, lambda number, _: received.append(number))
    for worker in workers:
        for relay in worker._relays:
            relay.start()
    host = printable(socket.gethostname())
    address = ""
    while True:
        while received:
            number = received.pop(0)
            for worker in workers:
                worker.signal(number)
        reports = {worker.number: worker.report(host) for worker in workers}
        verdict = link.exchange(reports)
        if verdict is not None:
            break
        if not address and (address := link.address):
            for worker in workers:
                worker.board.let_go(address)
        if link.done and all(one.fine for one in reports.values()):
            break
    for worker in workers:
        worker.kill()
    if verdict is not None:
        link.leave()
    for worker in workers:
        worker.close(show=verdict is None or worker.number == verdict.process)
    if verdict is not None:
        if verdict.line:
            write(2, f"error: {verdict.line}\n".encode())
        return verdict.code
    return max(worker.code or 0 for worker in workers)
