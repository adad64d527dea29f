"""Machines on a network: a namespace for each, with a name, an address and a cable to a switch.

Linux, and the right to make namespaces, are all that it needs. `cut` pulls a cable, without a word
to either side, as a switch that dies; `mute` loses what one machine sends to another.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--uts", "--kill-child"]
HOLD = ["sh", "-c", "echo there; exec sleep infinity"]
NOBODY = "02:00:00:00:00:99"  # a MAC that no machine has


def possible() -> bool:
    """Whether machines can be made here."""
    try:
        with make_network(1):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def address(machine: int) -> str:
    return f"10.77.0.{machine + 1}"


class Network:
    """Machines h0, h1 ...; see `make_network`."""

    def __init__(self, switch: int, machines: list[int]):
        self._switch, self._machines = switch, machines

    def enter(self, machine: int) -> list[str]:
        """What stands before a command that runs there."""
        return _enter(self._machines[machine])

    def cut(self, machine: int) -> None:
        _run(self._switch, f"ip link set dev port{machine} down")

    def mend(self, machine: int) -> None:
        _run(self._switch, f"ip link set dev port{machine} up")

    def mute(self, machine: int, to: int) -> None:
        """What a machine sends to the other one is lost; the other way all goes on."""
        _run(
            self._machines[machine],
            f"ip neigh replace {address(to)} lladdr {NOBODY} dev eth0 nud permanent",
        )


@contextlib.contextmanager
def make_network(count: int) -> Iterator[Network]:
    """So many machines, for as long as it is entered.

    Raises:
      OSError, CalledProcessError: it cannot be made here.
    """
    with contextlib.ExitStack() as resources:
        switch = resources.enter_context(_namespace(NAMESPACES))
        _run(switch, "ip link add name switch type bridge && ip link set dev switch up")
        hosts = Path(resources.enter_context(tempfile.TemporaryDirectory())) / "hosts"
        names = "".join(f"{address(n)} h{n}\n" for n in range(count))
        hosts.write_text(f"127.0.0.1 localhost\n{names}")
        inside = [*_enter(switch), *NAMESPACES[:1], *NAMESPACES[3:]]
        machines = [resources.enter_context(_namespace(inside)) for _ in range(count)]
        for n, machine in enumerate(machines):
            _run(
                switch,
                f"ip link add name port{n} type veth peer name eth0 netns {machine} && "
                f"ip link set dev port{n} master switch up",
            )
            _run(
                machine,
                f"hostname h{n} && mount --bind {hosts} /etc/hosts && ip link set dev lo up && "
                f"ip addr add {address(n)}/24 dev eth0 && ip link set dev eth0 up",
            )
        yield Network(switch, machines)


@contextlib.contextmanager
def _namespace(command: list[str]) -> Iterator[int]:
    """A process that waits in new namespaces; its number."""
    with subprocess.Popen(
        [*command, *HOLD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as holder:
        try:
            if holder.stdout.readline() != b"there\n":
                raise OSError(holder.stderr.read().decode())
            yield _innermost(holder.pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(holder.pid, signal.SIGKILL)


def _innermost(process: int) -> int:
    """unshare --kill-child forks, and nsenter may."""
    while children := Path(f"/proc/{process}/task/{process}/children").read_text().split():
        process = int(children[0])
    return process


def _enter(process: int) -> list[str]:
    return ["nsenter", f"--target={process}", "--user", "--net", "--mount", "--uts",
            "--preserve-credentials", "--"]  # fmt: skip


def _run(process: int, command: str) -> None:
    subprocess.run([*_enter(process), "sh", "-c", command], check=True, capture_output=True)
