"""Trains an image model, evaluates it, and predicts with it.

    python -m vision_jax.main --config=configs/vit_lora.py
    python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/b --config.optim.lr=1e-3
    python -m vision_jax.main --mode=evaluate --workdir=runs/vit_lora
    python -m vision_jax.main --mode=predict --workdir=runs/vit_lora --images cat.jpg dog.png
    python -m vision_jax.main --mode=robustness --workdir=runs/vit_lora
    python -m vision_jax.main --mode=frozen --config=configs/vit_lora.py
    python -m vision_jax.main --mode=teach --config=configs/distill_vit_small.py \\
        --config.distill.cache=said.array_record
    python -m vision_jax.main --plan --config=configs/vit_lora.py --devices=8 --memory=16

Running a training command again resumes it. Any field of the config file can be set with
--config.FIELD=VALUE. On several processes, give each --coordinator, --processes and --process (on
Cloud TPU and Slurm, --coordinator=auto is enough).
"""

import argparse
import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from vision_jax.errors import UserError

BAD_INPUT = 2  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it also raises
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except (UserError, OSError) as error:  # what the operating system refuses is its user's too
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("stopped; run the same command again to resume", file=sys.stderr)
        return 128 + signal.SIGINT


def _run(arguments: Sequence[str]) -> int:
    flags, overrides = _parse(arguments)
    if flags.plan:
        return _plan(flags, overrides)
    _start_processes(flags)
    from vision_jax import modes, train  # after the flags: importing JAX takes seconds
    from vision_jax.config import load_config

    if flags.mode in ("train", "frozen", "teach") and not flags.config:
        raise UserError("--config is missing: for example --config=configs/vit_lora.py")
    if not flags.config and not flags.workdir:
        raise UserError(f"--mode={flags.mode} needs --workdir=DIR, the folder of a finished run")
    workdir = flags.workdir or Path("runs") / _run_name(flags.config)
    if flags.mode == "teach":
        return modes.teach_once(load_config(flags.config, overrides))
    if flags.mode in ("train", "frozen"):
        run = train.run if flags.mode == "train" else modes.frozen
        return run(load_config(flags.config, overrides), workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(f"--workdir: {workdir} holds no run, there is no config.json in it")
    config = load_config(str(workdir / "config.json"), overrides)
    if flags.mode in ("evaluate", "robustness"):
        mode = modes.evaluate if flags.mode == "evaluate" else modes.robustness
        return mode(config, workdir, flags.checkpoint)
    return modes.predict(config, workdir, flags.checkpoint, flags.images, flags.out)


def _plan(flags: argparse.Namespace, overrides: dict[str, str]) -> int:
    """--plan; with --devices, for as many virtual devices of the CPU."""
    if not flags.config:
        raise UserError("--config is missing: for example --plan --config=configs/vit_lora.py")
    if flags.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        count = f"--xla_force_host_platform_device_count={flags.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    from vision_jax import plan
    from vision_jax.config import load_config

    return plan.run(load_config(flags.config, overrides), flags.memory)


def _run_name(config: str) -> str:
    """configs/transfer.py:timm/resnet50 -> transfer_timm_resnet50."""
    path, _, argument = config.partition(":")
    return re.sub(r"[^\w.]+", "_", f"{Path(path).stem}_{argument}").strip("_")


class _Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line, like every other bad input."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def _parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    parser = _Parser(
        prog="python -m vision_jax.main",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", help="a file with get_config(), for example configs/vit_lora.py"
    )
    parser.add_argument(
        "--workdir", type=Path, help="where results go; runs/NAME_OF_THE_CONFIG by default"
    )
    parser.add_argument(
        "--mode",
        choices=("train", "evaluate", "predict", "frozen", "robustness", "teach"),
        default="train",
        help="train or resume a run; reprint a finished one's numbers; name what --images show; "
        "nearest neighbours and few-shot regression on the weights' frozen features; accuracy "
        "under attacks and corruptions; store what a run's teachers say",
    )
    parser.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="which checkpoint evaluate, predict and robustness read",
    )
    parser.add_argument(
        "--images", nargs="+", action="extend", default=[], help="files or folders, for predict"
    )
    parser.add_argument("--out", type=Path, help="where predict writes; WORKDIR by default")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="compile the training step without running it: parameters, FLOPs, memory, "
        "communication",
    )
    parser.add_argument(
        "--devices", type=int, help="of --plan: this many virtual CPU devices, for config.mesh"
    )
    parser.add_argument(
        "--memory", type=float, help="of --plan: GiB of a device; the largest batches that fit"
    )
    parser.add_argument("--coordinator", help="HOST:PORT of process 0, or auto")
    parser.add_argument("--processes", type=int, help="how many processes there are")
    parser.add_argument("--process", type=int, help="which of them this one is")
    flags, rest = parser.parse_known_args(arguments)
    overrides = {}
    for argument in rest:
        if flags.images and not argument.startswith("-"):  # --images=A B is --images A B
            flags.images.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if not name.startswith("--config.") or not equals:
            raise UserError(
                f"unknown argument {argument!r}: config fields are set with --config.FIELD=VALUE, "
                "and --help lists the rest"
            )
        overrides[name.removeprefix("--config.")] = value
    return flags, overrides


def _start_processes(flags: argparse.Namespace) -> None:
    """Connects this process to the others, when there are any."""
    if not flags.coordinator:
        return
    import jax

    if flags.coordinator == "auto":
        jax.distributed.initialize()
    else:
        jax.distributed.initialize(flags.coordinator, flags.processes, flags.process)


def command() -> None:
    """The process's whole life: runs `main` and exits with its code.

    After a failed write orbax's and tensorstore's threads go on complaining, at exit too. What they
    have to say has been reported by then, and the process does not wait for them.
    """
    sys.unraisablehook = lambda _: None
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        os._exit(code)


if __name__ == "__main__":
    command()
