"""Fine-tune large vision models in JAX, from anybody's PyTorch weights.

    vision_jax --config=configs/vit_lora.py
    vision_jax --config=configs/vit_lora.py --workdir=runs/b --config.optim.lr=1e-3
    vision_jax --config=configs/vit_lora.py --workdir=runs/c --from=runs/b
    vision_jax evaluate --workdir=runs/vit_lora
    vision_jax predict --workdir=runs/vit_lora --images cat.jpg dog.png
    vision_jax robustness --workdir=runs/vit_lora
    vision_jax quantize --workdir=runs/vit_lora --config.ptq.activations=static
    vision_jax probe --config=configs/vit_lora.py
    vision_jax cache-teacher --config=configs/distill_vit_small.py \\
        --config.distill.cache=teacher.array_record
    vision_jax plan --config=configs/vit_lora.py --devices=8 --memory=16
    vision_jax search --config=configs/vit_lora.py --space=space.py --trials=64
    vision_jax launch --processes=2 -- --config=configs/vit_lora.py

`python -m vision_jax.main` and `python -m vision_jax` are the same program. Running a training
command again resumes it; --from begins a new run with another one's weights. Any field of the
config file can be set with --config.FIELD=VALUE; --show prints all of a config, --help-config what
they may be. `vision_jax launch --processes=8 -- --config=...` starts several processes on this
machine. On several machines give each --coordinator, --processes and --process; under Slurm, Open
MPI, Kubernetes' JobSet and on Cloud TPU, --coordinator=auto is enough.
"""

import argparse
import difflib
import importlib
import logging
import math
import os
import re
import runpy
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vision_jax.config import TASKS, Reading, fields, fields_of, read_config
from vision_jax.config.hints import suggest
from vision_jax.config.show import explain, show
from vision_jax.errors import UserError, UserErrors, nearest
from vision_jax.files import expand
from vision_jax.flags import Parser

BAD_INPUT = 2  # exit code


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      help: one line.
      run: "module:function", which returns the exit code; or a module that is a program with flags
        of its own.
      takes: what the function is called with, by the names of FLAGS: "config" is read by then.
      smaller: what needs less memory than a program with flags of its own was asked for.
    """

    help: str
    run: str
    takes: Sequence[str] = ()
    smaller: str = ""


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "train or resume a run", "vision_jax.train:run", ("config", "workdir", "from")
    ),
    "evaluate": Command(
        "reprint a finished run's numbers",
        "vision_jax.commands.evaluate:run",
        ("config", "workdir", "checkpoint"),
    ),
    "predict": Command(
        "name what --images show",
        "vision_jax.commands.predict:run",
        ("config", "workdir", "checkpoint", "images", "out", "weights"),
    ),
    "robustness": Command(
        "accuracy under attacks and corruptions",
        "vision_jax.commands.robustness:run",
        ("config", "workdir", "checkpoint"),
    ),
    "quantize": Command(
        "a finished run's model in 8 or 4 bits, its most sensitive layers in float",
        "vision_jax.commands.quantize:run",
        ("config", "workdir", "checkpoint", "out"),
    ),
    "compress": Command(
        "make a finished run smaller: prune or factorize, distill, train for int8, export",
        "vision_jax.commands.compress:run",
        ("config", "workdir"),
    ),
    "probe": Command(
        "nearest neighbours and few-shot regression on the weights' frozen features",
        "vision_jax.commands.probe:run",
        ("config", "workdir"),
    ),
    "cache-teacher": Command(
        "store the teacher outputs of a run", "vision_jax.commands.cache_teacher:run", ("config",)
    ),
    "plan": Command(
        "compile the training step without running it: FLOPs, memory, communication",
        "vision_jax.commands.plan:run",
        ("config", "memory", "scale"),
    ),
    "search": Command(
        "train many trials of a config in one program, and keep the best as a run",
        "vision_jax.commands.search:run",
        (
            *("config", "workdir", "space", "trials", "sampler", "scheduler", "rungs", "keep"),
            *("seed", "together", "plan"),
        ),
    ),
    "find-lr": Command(
        "suggest a learning rate, from one short run of rising rates",
        "vision_jax.commands.find_lr:run",
        ("config", "workdir"),
    ),
    "launch": Command(
        "start a command as several processes of this machine",
        "vision_jax.commands.launch",
    ),
    "convert": Command(
        "turn weights or a run into files of timm, torchvision or transformers",
        "vision_jax.convert",
    ),
    "export": Command(
        "write a model as StableHLO and other files that run elsewhere, with a certificate",
        "vision_jax.commands.export",
        smaller="a smaller --batch or --image-size",
    ),
    "serve": Command(
        "answer images over HTTP: names, boxes or masks, many requests in one batch",
        "vision_jax.commands.serve",
        smaller="--rows=1, or a smaller --image-size or --window",
    ),
    "watch": Command(
        "raise alarms by rules on what a detector sees in videos",
        "vision_jax.commands.watch",
        smaller="--rows=1",
    ),
    "review": Command(
        "look at what `watch` has seen: its page, figures, images to fine-tune on",
        "vision_jax.commands.review",
    ),
    "explain": Command(
        "show what a classifier looks at, by several methods, and measure each",
        "vision_jax.commands.explain",
        smaller="fewer --images or a smaller --limit, or other --methods",
    ),
    "generate": Command(
        "make images by a trained generator, and measure how good they are",
        "vision_jax.commands.generate",
        smaller="a smaller --batch-size",
    ),
    "prune": Command(
        "cut channels, heads and layers out of a trained model",
        "vision_jax.commands.prune",
        smaller="--score=magnitude",
    ),
    "factorize": Command(
        "make two narrow products of each layer of a trained model, where little is lost",
        "vision_jax.commands.factorize",
        smaller="fewer --images, or --score=weights",
    ),
    "certify": Command(
        "compare an imported model with its source, number by number", "vision_jax.certify"
    ),
    "doctor": Command("examine a data set before training", "vision_jax.doctor"),
    "models": Command(
        "list the models whose weights can be loaded",
        "vision_jax.commands.models:run",
        ("PATTERN",),
    ),
    "configs": Command(
        "list the configs that come with the package", "vision_jax.commands.configs:run"
    ),
}
MOVED = {"frozen": "probe", "teach": "cache-teacher"}  # older names
# These take --config.
FROM_CONFIG = ("train", "probe", "cache-teacher", "plan", "search", "find-lr", "compress")
FROM_WORKDIR = ("evaluate", "predict", "robustness", "quantize")  # these a finished run
CONFIGURED = (*FROM_CONFIG, *FROM_WORKDIR)
COMPUTING = ("train", "probe", "cache-teacher", "search", "find-lr", "compress", *FROM_WORKDIR)
# Fields that a finished run keeps: what it is and was trained with.
KEPT = re.compile(
    r"task|total_steps|batch_size|(checkpoint|log)_every|trainable|recipes|evaluate\.(every|stop_after|warn_after)"
    r"|(mask|quantize|lora|distill|optim|augment|loss|flow)\..*|model\.(?!dtype$|scan$|merge$).*"
    r"|data\.(subset|short|longest|shorts|crop.*|interpolation|flip|brightness|contrast|saturation"
    r"|max_damaged|classes)"
)
# Of each flag: the commands that look at it, with which alone it may stand, and argparse's words.
# What is in capitals is no flag, it stands by itself.
FLAGS: Mapping[str, tuple[Sequence[str], Mapping[str, Any]]] = {
    "PATTERN": (
        ("models",),
        {"nargs": "*", "help": "parts of names, or names with * and ?"},
    ),
    "config": (
        FROM_CONFIG,
        {"help": "a file with get_config(), for example configs/vit_lora.py"},
    ),
    "workdir": (
        ("train", "probe", "search", "find-lr", "compress", *FROM_WORKDIR),
        {
            "type": expand,
            "help": "a run's folder; runs/NAME_OF_THE_CONFIG for a config, of a search "
            "runs/NAME_OF_THE_CONFIG_search",
        },
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
    "out": (
        ("predict", "quantize"),
        {
            "type": expand,
            "help": "where files go; WORKDIR by default, of quantize WORKDIR/quantized",
        },
    ),
    "space": (
        ("search",),
        {"help": "a file with get_space(), the ranges of fields; docs/search.md"},
    ),
    "trials": (("search",), {"type": int, "help": "how many; 32 by default"}),
    "sampler": (
        ("search",),
        {"help": "random (the default), sobol, grid, optuna:tpe, optuna:gp or optuna:cmaes"},
    ),
    "scheduler": (
        ("search",),
        {"help": "which trials go on: none (all, the default), halving, median or population"},
    ),
    "rungs": (
        ("search",),
        {"type": int, "help": "comparisons before the end, of a scheduler; 2 by default"},
    ),
    "keep": (
        ("search",),
        {"type": float, "help": "of halving, the share that goes on; a third by default"},
    ),
    "seed": (("search",), {"type": int, "help": "of the draws; 0 by default"}),
    "together": (
        ("search",),
        {
            "type": int,
            "help": "most trials of one program; by default 16, as many at a time as fit",
        },
    ),
    "plan": (
        ("search",),
        {
            "action": "store_const",
            "const": True,
            "help": "print which trials share what, FLOPs and memory, and end",
        },
    ),
    "weights": (
        ("predict",),
        {"help": "instead of a run: a file or folder of weights, hf://OWNER/NAME, timm://NAME"},
    ),
    "devices": (("plan",), {"type": int, "help": "as many virtual CPU devices, for config.mesh"}),
    "memory": (
        ("plan",),
        {"type": float, "help": "GiB of a device; also tells the largest batches that fit"},
    ),
    "scale": (
        ("plan",),
        {
            "type": int,
            "nargs": "+",
            "help": "numbers of devices to go on to by formula, each with a device's share of the "
            "batch",
        },
    ),
    "show": (
        CONFIGURED,
        {
            "action": "store_const",
            "const": True,
            "help": "print every field with its value, where it comes from and its help, and end",
        },
    ),
    "help-config": (
        CONFIGURED,
        {
            "nargs": "?",
            "const": "",
            "metavar": "NAME",
            "help": "print what a field, those of a section, or all may be, and end",
        },
    ),
    "no-cache": (
        COMPUTING,
        {
            "action": "store_const",
            "const": True,
            "help": "compile anew: neither read nor keep compiled programs in the cache folder",
        },
    ),
    "no-kept-memory": (
        COMPUTING,
        {
            "action": "store_const",
            "const": True,
            "help": "on a CPU, give the memory of each step back to the system: slower",
        },
    ),
    "coordinator": (
        ("train", "probe", *FROM_WORKDIR),
        {"help": "HOST:PORT of process 0, or auto"},
    ),
    "processes": (
        ("train", "probe", *FROM_WORKDIR),
        {"type": int, "help": "how many processes there are"},
    ),
    "process": (
        ("train", "probe", *FROM_WORKDIR),
        {"type": int, "help": "which of them this one is"},
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 128 + n after signal n."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs what it also raises
    arguments = sys.argv[1:] if arguments is None else arguments
    several, text = any(argument.startswith("--coordinator") for argument in arguments), ""
    unforeseen: Exception | None = None
    try:
        code = _run(arguments)
    except UserErrors as errors:
        code, text = BAD_INPUT, "\n".join(f"error: {error}" for error in errors.each)
    except (UserError, OSError) as error:  # what the operating system refuses is its user's too
        code, text = BAD_INPUT, f"error: {error}"
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
        text = "stopped; run the same command again to resume"
    except Exception as error:
        if not several:
            raise
        code, text, unforeseen = 1, traceback.format_exc(), error
    if several:
        from vision_jax import processes

        processes.end(text, code, unforeseen)
    elif text:
        print(text, file=sys.stderr)
    return code


def _run(arguments: Sequence[str]) -> int:
    name, arguments = _find_command(arguments)
    if not name:
        print(overview())
        return 0
    command = COMMANDS[name]
    if name == "launch":
        from vision_jax.commands import launch

        return main(launch.start(arguments))
    if ":" not in command.run:
        return _run_program(command, arguments)
    flags, overrides = _parse(name, arguments)
    if flags["help-config"] is not None:
        print("\n".join(explain(flags["help-config"])))
        return 0
    if flags["coordinator"]:  # first: what fails on one process only is told to the others
        mine = _find_others(flags)
        from vision_jax import processes

        processes.connect(mine)
    if flags["weights"]:
        if given := [
            flag for flag in ("workdir", "checkpoint", "show", "coordinator") if flags[flag]
        ]:
            raise UserError(f"--{given[0]} is of a run, and --weights stand in its place: give one")
        flags["config"] = overrides
    elif name in CONFIGURED:
        reading, workdir = _read(name, flags, overrides)  # before JAX, whose import takes seconds
        if flags["show"]:
            print("\n".join(show(reading)))
            return 0
        flags |= {"config": reading.config, "workdir": workdir}
        flags["checkpoint"] = flags["checkpoint"] or "last"
    if flags["devices"]:
        os.environ["JAX_PLATFORMS"] = "cpu"
        count = f"--xla_force_host_platform_device_count={flags['devices']}"
        # The last one counts, and XLA reads no flag behind a word that is none
        # (findings/xla_flags_end_at_a_word.sh).
        os.environ["XLA_FLAGS"] = f"{count} {os.environ.get('XLA_FLAGS', '')} {count}"
    if name in COMPUTING:
        from vision_jax import machine

        if not flags["no-kept-memory"]:
            machine.keep_memory()
        # Several processes on CPUs that load a detector's step from the cache hang in its first
        # collective, where those that compile it go on (jaxlib 0.10.2).
        if not flags["no-cache"] and not (flags["coordinator"] and machine.is_cpu()):
            machine.keep_compiled()
    module, _, function = command.run.partition(":")
    run = getattr(importlib.import_module(module), function)
    if flags["coordinator"]:
        processes.check_installation()
        processes.check_equal("config", {"command": name} | _of_all(flags["config"]))
    try:
        return run(*(flags[taken] for taken in command.takes))
    except Exception as error:
        if not (line := _advise(error, flags["config"])):
            raise
        raise UserError(line) from error


def _advise(error: Exception, config: Any, smaller: str = "") -> str:
    """One line where the memory of a device, or of the host, is not enough; "" for other errors."""
    if isinstance(error, UserError | OSError):
        return ""
    from vision_jax import memory  # and JAX, whose import takes seconds

    values = fields(config) if isinstance(config, ConfigDict) else {}
    if not memory.is_out_of_memory(error):
        return ""
    return memory.advise(error, values, smaller or memory.SMALLER)


def _find_others(flags: dict[str, Any]) -> Any:
    """This process among the others: it is forked here, and the one that was started watches it.

    JAX must not be in use by then: it has threads that a fork would leave behind.
    """
    from vision_jax.hosts import detect, link, supervise

    if (mine := supervise.mine()) is None:
        if flags["coordinator"] == "auto":
            place = detect.find_place(os.environ)
            if devices := detect.devices_of_this(os.environ):
                os.environ["JAX_LOCAL_DEVICE_IDS"] = devices
        else:
            place = link.Place(flags["coordinator"], flags["processes"], flags["process"])
        if not 0 <= place.first < place.processes:
            raise UserError(
                f"--process is {place.first}, and --processes {place.processes}: they count from 0"
            )
        mine = supervise.start(place)
    flags["process"] = mine.process
    return mine


def _run_program(command: Command, arguments: Sequence[str]) -> int:
    """Runs a module as `python -m` does; returns the exit code."""
    before, module = sys.argv, command.run
    sys.argv = [module, *arguments]
    try:
        with warnings.catch_warnings():  # a notebook may have imported it already
            warnings.filterwarnings(
                "ignore", r".* found in sys\.modules after import", RuntimeWarning
            )
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return int(end.code or 0)
    except Exception as error:
        if not (line := _advise(error, None, command.smaller)):
            raise
        raise UserError(line) from error
    finally:
        sys.argv = before
    return 0


def _read(name: str, flags: Mapping[str, Any], overrides: dict[str, str]) -> tuple[Reading, Path]:
    """(the config of a file or a finished run, the run's folder); says what it filled in."""
    path, workdir = flags["config"], flags["workdir"]
    if name in FROM_WORKDIR or (flags["show"] and workdir and not path):
        if not workdir:
            other = " or --weights=FILE" if name == "predict" else ""
            raise UserError(f"{name} needs --workdir=DIR, a finished run's folder{other}")
        path = str(workdir / "config.json")
        if not Path(path).is_file():
            raise UserError(f"--workdir: {workdir} holds no run, there is no config.json in it")
        if kept := [field for field in overrides if KEPT.fullmatch(field)]:
            raise UserErrors(
                [
                    f"--config.{field} is a field of training, and {name} takes the finished run "
                    "as it is: leave it out"
                    for field in kept
                ]
            )
    elif not path:
        raise UserError("--config is missing: for example --config=configs/vit_lora.py")
    reading = read_config(path, overrides)
    suffix = "_search" if name == "search" else ""
    workdir = workdir or Path("runs") / (_run_name(path) + suffix)
    notes, held = reading.notes, workdir / "config.json"
    if name == "train" and held.is_file() and path != str(held):  # the run that training resumes
        notes += read_config(str(held), {}).notes
    if not flags["process"]:
        for note in notes:
            print(f"note: {note}")
    return reading, workdir


def _run_name(config: str) -> str:
    """configs/transfer.py:timm/resnet50 -> transfer_timm_resnet50."""
    path, _, argument = config.partition(":")
    return re.sub(r"[^\w.]+", "_", f"{Path(path).stem}_{argument}").strip("_")


def overview() -> str:
    """What there is, for people."""
    title, _, examples = __doc__.partition("\n")
    listed = "\n".join(f"    {name:13}  {command.help}" for name, command in COMMANDS.items())
    return f"""{title}

    vision_jax COMMAND ...

{listed}

train is the default. Each has --help. For example:
{examples.rstrip()}"""


def _find_command(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """(a key of COMMANDS, what belongs to it), or ("", ()) where the overview is asked for.

    Raises:
      UserError: no such command.
    """
    word = arguments[0] if arguments else "help"
    if word in ("help", "--help", "-h"):
        return "", ()
    if word in COMMANDS:
        return word, arguments[1:]
    if re.fullmatch(r"\w[\w-]*", word):
        raise UserError(_no_command(word))
    # Programs out there say --mode=NAME and --plan.
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--mode", default="train")
    parser.add_argument("--plan", dest="mode", action="store_const", const="plan")
    flags, rest = parser.parse_known_args(arguments)
    if flags.mode not in COMMANDS:
        raise UserError(_no_command(flags.mode))
    return flags.mode, rest


def _no_command(name: str) -> str:
    if name in MOVED:
        return f"{name} is called {MOVED[name]} now: `vision_jax {MOVED[name]}`"
    hint = nearest(name, list(COMMANDS)) or "; --help lists them"
    return f"there is no command {name!r}{hint}"


def _parse(name: str, arguments: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """(the flags of a command by name, fields to set)."""
    configured = name in CONFIGURED
    parser = Parser(
        prog=f"vision_jax {name}",
        description=COMMANDS[name].help,
        epilog="Fields of the config are set with --config.FIELD=VALUE." if configured else None,
        allow_abbrev=False,
    )
    for flag, (commands, words) in FLAGS.items():
        if flag.isupper() and name in commands:
            parser.add_argument(flag, **words)
        elif not flag.isupper():  # another command's is known too, to say whose it is
            hidden = {} if name in commands else {"help": argparse.SUPPRESS}
            parser.add_argument(f"--{flag}", dest=flag, **{**words, **hidden})
    parsed, rest = parser.parse_known_args(arguments)
    flags = vars(parsed)
    overrides: dict[str, str] = {}
    while rest:
        argument, *rest = rest
        if flags["images"] and not argument.startswith("-"):  # --images=A B is --images A B
            flags["images"].append(argument)
            continue
        field, equals, value = argument.partition("=")
        if not field.startswith("--config."):
            raise UserError(_unknown(argument))
        if not configured:
            raise UserError(f"{field} is a field of a config, and {name} takes none: leave it out")
        if not equals:  # --config.FIELD VALUE
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{field} has no value: write {field}=VALUE")
            value, *rest = rest
        overrides[field.removeprefix("--config.")] = value
    _check_flags(name, flags)
    return flags, overrides


def _unknown(argument: str) -> str:
    """What to say of an argument that there is not."""
    name, equals, value = argument.partition("=")
    known = [f"--{flag}" for flag in FLAGS if not flag.isupper()]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    field = suggest(name.lstrip("-"), [*{n: 0 for task in TASKS for n in fields_of(task)}])
    if argument in COMMANDS:
        hint = f": a command comes first, `vision_jax {argument} ...`"
    elif near:
        hint = f": did you mean `{near[0]}`?"
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


def _check_flags(name: str, flags: Mapping[str, Any]) -> None:
    """Refuses flags that a command would not look at: people trust that what they type counts."""
    given = {flag: value for flag, value in flags.items() if value not in (None, [])}
    stray = [
        f"--{flag} is a flag of {', '.join(FLAGS[flag][0])}, and this is {name}: leave it out, or "
        "choose another command"
        for flag in given
        if name not in FLAGS[flag][0]
    ]
    if stray:
        raise UserErrors(stray)
    for flag, fewest in (("devices", 1), ("processes", 1), ("process", 0)):
        if flag in given and given[flag] < fewest:
            raise UserError(f"--{flag} is {given[flag]}: it must be at least {fewest}")
    if any(not 1 <= count <= 2**20 for count in given.get("scale", [])):
        raise UserError(f"--scale is {given['scale']}: numbers of devices, from 1 to {2**20:,}")
    if "memory" in given and not 0 < given["memory"] < math.inf:
        raise UserError(f"--memory is {given['memory']:g}: it must be a size above 0, in GiB")
    counted = {"processes", "process"} & given.keys()
    if flags["coordinator"] == "auto" and counted:
        raise UserError("--coordinator=auto finds --processes and --process: leave them out")
    if flags["coordinator"] != "auto" and 0 < len(counted) + bool(flags["coordinator"]) < 3:
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
