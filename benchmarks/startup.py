"""From the command to the first step, with nothing cached and with compiled programs cached.

    python -m benchmarks.startup                      # configs/vit_lora.py and two others
    python -m benchmarks.startup --before=../before   # beside another checkout, by turns
    python -m benchmarks.startup --whole              # the main job from its start to its end

A command is `python -m vision_jax.main`, in a folder of its own for its cache, and ends when
metrics.jsonl has the first step. Printed are CPU seconds (the user's and the system's), wall
seconds and peak memory of the process, medians over `--rounds`; the ratio is the other checkout's
over ours. The larger models begin at random and see the embedded data.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LARGER = (
    "--config.model.weights=",
    "--config.batch_size=8",
    "--config.data.train=embedded:fashion_mnist/train",
    "--config.data.eval=embedded:fashion_mnist/test",
)
JOBS = {
    "configs/vit_lora.py": (),
    "configs/resnet50_frozen.py": (*LARGER, "--config.model.variant=resnet50"),
    "configs/detr_tiny.py": (),
}
POLL = 0.02  # seconds between looks at metrics.jsonl


def take(command: Sequence[str], checkout: Path, cache: Path, whole: bool) -> dict[str, Any]:
    """CPU and wall seconds and peak bytes of a training, to its first step or to its end.

    Raises:
      RuntimeError: it failed.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(checkout)}
    with tempfile.TemporaryDirectory() as workdir:
        log = Path(workdir) / "log"
        with log.open("w") as file:
            start = time.monotonic()
            process = subprocess.Popen(
                [*command, f"--workdir={workdir}/run"],
                cwd=checkout,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            metrics = Path(workdir) / "run" / "metrics.jsonl"
            ended = 0
            while not ended:
                if not whole and metrics.is_file() and metrics.stat().st_size:
                    os.kill(process.pid, signal.SIGKILL)  # Popen's own would reap what has ended
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
                time.sleep(0 if ended else POLL)
            wall = time.monotonic() - start
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, *(() if whole else (-9,))):
            raise RuntimeError(log.read_text()[-500:])
    return {
        "cpu": usage.ru_utime + usage.ru_stime,
        "system": usage.ru_stime,
        "wall": wall,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def measure(config: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A record for each checkout and each state of the cache, by turns."""
    checkouts = {"ours": ROOT} | ({"before": flags.before.resolve()} if flags.before else {})
    command = [sys.executable, "-m", "vision_jax.main", f"--config={config}", *JOBS[config]]
    if not flags.whole:
        command += ["--config.log_every=1"]
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(flags.rounds):
        for name, checkout in checkouts.items():
            with tempfile.TemporaryDirectory() as cache:
                for state in ("cold", "warm"):
                    found = take(command, checkout, Path(cache), flags.whole)
                    taken.setdefault((name, state), []).append(found)
    return [
        {"job": config, "side": name, "cache": state}
        | {key: statistics.median(one[key] for one in every) for key in every[0]}
        | {"spread": max(o["cpu"] for o in every) - min(o["cpu"] for o in every)}
        for (name, state), every in taken.items()
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="another checkout")
    parser.add_argument("--configs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--whole", action="store_true", help="to the end of the first config")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the records here")
    flags = parser.parse_args()
    records = []
    columns = f"{'':8}{'cache':>6}{'CPU-s':>9}{'system':>8}{'wall':>8}{'GB':>7}{'ratio':>7}"
    print(columns, flush=True)
    for config in flags.configs[: 1 if flags.whole else None]:
        found = measure(config, flags)
        ours = {record["cache"]: record["cpu"] for record in found if record["side"] == "ours"}
        print(config)
        for record in found:
            record["ratio"] = record["cpu"] / ours[record["cache"]]
            print(
                f"  {record['side']:6}{record['cache']:>6}{record['cpu']:9.1f}"
                f"{record['system']:8.1f}{record['wall']:8.1f}{record['peak_bytes'] / 1e9:7.2f}"
                f"{record['ratio']:7.2f}",
                flush=True,
            )
        records += found
        if flags.json:
            flags.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
