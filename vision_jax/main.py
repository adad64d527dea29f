"""Trains an image model, evaluates it, and predicts with it.

    python -m vision_jax.main --config=configs/vit_lora.py
    python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/b --config.optim.lr=1e-3
    python -m vision_jax.main --config=configs/vit_lora.py --workdir=runs/c --from=runs/b
    python -m vision_jax.main --mode=evaluate --workdir=runs/vit_lora
    python -m vision_jax.main --mode=predict --workdir=runs/vit_lora --images cat.jpg dog.png
    python -m vision_jax.main --mode=robustness --workdir=runs/vit_lora
    python -m vision_jax.main --mode=frozen --config=configs/vit_lora.py
    python -m vision_jax.main --mode=teach --config=configs/distill_vit_small.py \\
        --config.distill.cache=said.array_record
    python -m vision_jax.main --plan --config=configs/vit_lora.py --devices=8 --memory=16

Running a training command again resumes it; --from begins a new run with another one's weights.
Any field of the config file can be set with --config.FIELD=VALUE. On several processes, give each
--coordinator, --processes and --process (on Cloud TPU and Slurm, --coordinator=auto is enough).
"""

import argparse
import difflib
import logging
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vision_jax.config import TASKS, fields, fields_of, read_config
from vision_jax.config.hints import suggest
from vision_jax.errors import UserError, UserErrors
from vision_jax.files import expand

BAD_INPUT = 2  # exit code

MODES = {
    "train": "train or resume a run",
    "evaluate": "reprint a finished one's numbers",
    "predict": "name what --images show",
    "robustness": "accuracy under attacks and corruptions",
    "frozen": "nearest neighbours and few-shot regression on the weights' frozen features",
    "teach": "store what a run's teachers say",
    "plan": "compile the training step without running it: FLOPs, memory, communication",
}
FROM_CONFIG = ("train", "frozen", "teach", "plan")  # these take --config
FROM_WORKDIR = ("evaluate", "predict", "robustness")  # these a finished run
# Fields that a finished run keeps: what it is and was trained with.
KEPT = re.compile(
    r"task|total_steps|batch_size|(checkpoint|log)_every|trainable|recipes|evaluate\.(every|patience)"
    r"|(lora|distill|optim|augment|loss)\..*|model\.(?!dtype$|scan$).*"
    r"|data\.(subset|short|longest|shorts|crop.*|interpolation|flip|brightness|contrast|saturation"
    r"|max_damaged)"
)
# Of each flag: the modes that look at it, in which alone it may stand, and argparse's words.
FLAGS: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "config": (
        FROM_CONFIG,
        {"help": "a file with get_config(), for example configs/vit_lora.py"},
    ),
    "workdir": (
        ("train", "frozen", *FROM_WORKDIR),
        {"type": expand, "help": "where results go; runs/NAME_OF_THE_CONFIG by default"},
    ),
    "checkpoint": (
        FROM_WORKDIR,
        {"choices": ("last", "best"), "help": "which one is read; last by default"},
    ),
    "from": (
        ("train",),
        {"type": expand, "help": "the folder of a run, with whose weights a new run begins"},
    ),
    "images": (
        ("predict",),
        {"nargs": "+", "action": "extend", "default": [], "help": "files or folders"},
    ),
    "out": (("predict",), {"type": expand, "help": "where files go; WORKDIR by default"}),
    "devices": (("plan",), {"type": int, "help": "as many virtual CPU devices, for config.mesh"}),
    "memory": (
        ("plan",),
        {"type": float, "help": "GiB of a device; also tells the largest batches that fit"},
    ),
    "coordinator": (
        ("train", "frozen", *FROM_WORKDIR),
        {"help": "HOST:PORT of process 0, or auto"},
    ),
    "processes": (
        ("train", "frozen", *FROM_WORKDIR),
        {"type": int, "help": "how many processes there are"},
    ),
    "process": (
        ("train", "frozen", *FROM_WORKDIR),
        {"type": int, "help": "which of them this one is"},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it also raises
    arguments = sys.argv[1:] if arguments is None else arguments
    several = any(argument.startswith("--coordinator") for argument in arguments)
    try:
        code = _run(arguments)
    except UserErrors as errors:
        code, text = BAD_INPUT, "\n".join(f"error: {error}" for error in errors.each)
    except (UserError, OSError) as error:  # what the operating system refuses is its user's too
        code, text = BAD_INPUT, f"error: {error}"
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        text = "stopped; run the same command again to resume"
    except Exception:
        if not several:
            raise
        code, text = 1, traceback.format_exc()
    else:
        text = ""
    if several:
        from vision_jax import processes

        processes.end(text, code)
    elif text:
        print(text, file=sys.stderr)
    return code


def _run(arguments: Sequence[str]) -> int:
    flags, overrides = _parse(arguments)
    if flags.coordinator:  # first: what fails on one process only is told to the others
        from vision_jax import processes

        processes.connect(flags.coordinator, flags.processes, flags.process)
    config, workdir = _load(flags, overrides)  # before importing JAX, which takes seconds
    if flags.devices:
        os.environ["JAX_PLATFORMS"] = "cpu"
        count = f"--xla_force_host_platform_device_count={flags.devices}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    from vision_jax import modes, plan, train

    if flags.coordinator:
        processes.check_equal("config", {"--mode": flags.mode} | _of_all(config))

    match flags.mode:
        case "train":
            return train.run(config, workdir, getattr(flags, "from"))
        case "frozen":
            return modes.frozen(config, workdir)
        case "teach":
            return modes.teach_once(config)
        case "plan":
            return plan.run(config, flags.memory)
        case "evaluate":
            return modes.evaluate(config, workdir, flags.checkpoint or "last")
        case "robustness":
            return modes.robustness(config, workdir, flags.checkpoint or "last")
    return modes.predict(config, workdir, flags.checkpoint or "last", flags.images, flags.out)


def _load(flags: argparse.Namespace, overrides: dict[str, str]) -> tuple[ConfigDict, Path]:
    """(the config of a file or a finished run, the run's folder); says what it filled in."""
    if flags.mode in FROM_CONFIG:
        if not flags.config:
            raise UserError("--config is missing: for example --config=configs/vit_lora.py")
        path, workdir = flags.config, flags.workdir or Path("runs") / _run_name(flags.config)
    else:
        if not flags.workdir:
            raise UserError(f"--mode={flags.mode} needs --workdir=DIR, a finished run's folder")
        workdir, path = flags.workdir, str(flags.workdir / "config.json")
        if not Path(path).is_file():
            raise UserError(f"--workdir: {workdir} holds no run, there is no config.json in it")
        if kept := [name for name in overrides if KEPT.fullmatch(name)]:
            raise UserErrors(
                [
                    f"--config.{name} is a field of training, and --mode={flags.mode} takes the "
                    "finished run as it is: leave it out"
                    for name in kept
                ]
            )
    config, notes = read_config(path, overrides)
    held = workdir / "config.json"  # of the run that training resumes
    if flags.mode == "train" and held.is_file():
        notes += read_config(str(held), {})[1]
    if not flags.process:
        for note in notes:
            print(f"note: {note}")
    return config, workdir


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
    what = "; ".join(f"{mode}: {text}" for mode, text in MODES.items())
    parser.add_argument("--mode", choices=MODES, help=f"{what}. The first by default")
    parser.add_argument("--plan", action="store_true", help="the same as --mode=plan")
    for name, (modes, options) in FLAGS.items():
        words = {**options, "help": f"of {', '.join(modes)}: {options['help']}"}
        parser.add_argument(f"--{name}", **words)
    flags, rest = parser.parse_known_args(arguments)
    if flags.plan and flags.mode not in (None, "plan"):
        raise UserError(f"--plan is a mode by itself: leave it or --mode={flags.mode} out")
    flags.mode = "plan" if flags.plan else flags.mode or "train"
    overrides: dict[str, str] = {}
    while rest:
        argument, *rest = rest
        if flags.images and not argument.startswith("-"):  # --images=A B is --images A B
            flags.images.append(argument)
            continue
        name, equals, value = argument.partition("=")
        if not name.startswith("--config."):
            raise UserError(_unknown(argument))
        if not equals:  # --config.FIELD VALUE
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name} has no value: write {name}=VALUE")
            value, *rest = rest
        overrides[name.removeprefix("--config.")] = value
    _check_flags(flags)
    return flags, overrides


def _unknown(argument: str) -> str:
    """What to say of an argument that there is not."""
    name, equals, value = argument.partition("=")
    known = [f"--{flag}" for flag in ("mode", "plan", *FLAGS)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    field = suggest(name.lstrip("-"), [*{n: 0 for task in TASKS for n in fields_of(task)}])
    if near:
        hint = f": did you mean `{near[0]}`?"
    elif argument in MODES:
        hint = f": did you mean `--mode={argument}`?"
    elif argument.startswith("-") or equals:
        hint = field.replace("`", "`--config.", 1).replace("`?", f"{equals}{value}`?", 1)
    elif argument.partition(":")[0].endswith((".py", ".json")):
        hint = f": did you mean `--config={argument}`?"
    else:
        hint = ""
    return (
        f"unknown argument {argument!r}{hint}: config fields are set with --config.FIELD=VALUE, "
        "and --help lists the rest"
    )


def _check_flags(flags: argparse.Namespace) -> None:
    """Refuses flags that the mode would not look at: people trust that what they type counts."""
    given = [name for name in FLAGS if getattr(flags, name) not in (None, [])]
    stray = [
        f"--{name} is a flag of {', '.join(FLAGS[name][0])}, and this is {flags.mode}: leave it "
        "out, or choose another --mode"
        for name in given
        if flags.mode not in FLAGS[name][0]
    ]
    if stray:
        raise UserErrors(stray)
    for name, fewest in (("devices", 1), ("processes", 1), ("process", 0)):
        if name in given and getattr(flags, name) < fewest:
            raise UserError(f"--{name} is {getattr(flags, name)}: it must be at least {fewest}")
    if "memory" in given and not 0 < flags.memory < math.inf:
        raise UserError(f"--memory is {flags.memory:g}: it must be a size above 0, in GiB")
    counted = {"processes", "process"} & {*given}
    if flags.coordinator == "auto" and counted:
        raise UserError("--coordinator=auto finds --processes and --process: leave them out")
    if flags.coordinator != "auto" and 0 < len(counted) + bool(flags.coordinator) < 3:
        raise UserError(
            "--coordinator=HOST:PORT, --processes and --process go together: give all three"
        )


def _of_all(config: ConfigDict) -> dict[str, Any]:
    """The fields that must be the same on all processes: the machines may differ."""
    return {name: value for name, value in fields(config).items() if name != "data.threads"}


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
