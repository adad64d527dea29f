"""Starts a command as several processes of this machine.

    vision_jax launch --processes=8 -- --config=configs/vit_lora.py --workdir=runs/a
    vision_jax launch --processes=2 -- evaluate --workdir=runs/a

They meet over the loopback. Each line that one prints begins with its number, [3] say. The first
failure ends all, in one line that says whose it is, and its exit code is that of the launcher;
docs/hosts.md lists them. SIGTERM and Ctrl-C reach all; no process outlives the launcher. NVIDIA
GPUs are shared out evenly; CUDA_VISIBLE_DEVICES or JAX_LOCAL_DEVICE_IDS say otherwise.
"""

import os
import re
from collections.abc import Sequence

from vision_jax.errors import UserError
from vision_jax.flags import make_parser
from vision_jax.hosts import link, supervise
from vision_jax.hosts.detect import share_of_gpus


def start(arguments: Sequence[str]) -> list[str]:
    """Starts the processes; returns, in each of them, its arguments. The launcher itself ends.

    Raises:
      UserError: nothing that could be started.
    """
    count, rest = _parse(arguments)
    mine = supervise.start(link.Place("", count, 0, count), prefixed=True)
    if devices := share_of_gpus(os.environ, mine.process, count):
        os.environ["JAX_LOCAL_DEVICE_IDS"] = devices
    flags = (f"--processes={mine.processes}", f"--process={mine.process}")
    return [*rest, "--coordinator=127.0.0.1:1", *flags]  # they have met already


def _parse(arguments: Sequence[str]) -> tuple[int, list[str]]:
    """(how many processes, the command's arguments)."""
    before, rest = list(arguments), []
    if "--" in before:
        at = before.index("--")
        before, rest = before[:at], before[at + 1 :]
    parser = make_parser("vision_jax launch", __doc__)
    parser.add_argument("--processes", type=int, required=True, help="how many, at least 1")
    flags = parser.parse_args(before)
    if flags.processes < 1:
        raise UserError(f"--processes is {flags.processes}: it must be at least 1")
    if not rest:
        raise UserError("nothing to launch: write the command after --, as in -- --config=...")
    given = [one for one in rest if re.match(r"--(coordinator|processes|process)\b", one)]
    if given or rest[0] == "launch":
        raise UserError(
            f"{(given or rest)[0]} is for a process that is started alone: leave it out"
        )
    return flags.processes, rest
