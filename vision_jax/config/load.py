"""Reading a config, overriding its fields, keeping it beside its results.

A config file defines `get_config() -> ConfigDict`: `default_config(task)` with what it changes. A
config in JSON, such as a run's own config.json, may leave fields out too: they have their defaults.
All that is wrong with a config is told at once.
"""

import inspect
import json
import re
import runpy
import traceback
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vision_jax import files
from vision_jax.config.fields import RECIPES, TASKS, Field, Value, fields_of
from vision_jax.config.hints import RENAMED, suggest
from vision_jax.config.literals import read_literal
from vision_jax.errors import UserError, UserErrors, nearest

PACKAGE = Path(__file__).parents[1]
# Where a wheel has the configs that come with the package, and where a checkout has them.
CONFIGS = (PACKAGE / "configs", PACKAGE.parent / "configs")
LISTED = 8  # fields that a note names


def default_config(task: str) -> ConfigDict:
    """Every field of a task at its default; locked, so that a config file adds none by mistake.

    Raises:
      UserError: no such task.
    """
    return _nested({name: field.default for name, field in _table(task).items()})


@dataclass(frozen=True)
class Reading:
    """A config and how it came about.

    Attributes:
      config: every field, locked.
      notes: for people: what was filled in, carried over, left out or fitted.
      origins: where each field's value comes from: DEFAULT, FILE, COMMAND_LINE, RUN or FILLED_IN.
    """

    config: ConfigDict
    notes: tuple[str, ...]
    origins: Mapping[str, str]


DEFAULT, FILE, COMMAND_LINE = "default", "file", "command line"
RUN, FILLED_IN = "run's config.json", "filled in"


def load_config(path: str, overrides: Mapping[str, str]) -> ConfigDict:
    """`read_config` without how it came about."""
    return read_config(path, overrides).config


def read_config(path: str, overrides: Mapping[str, str]) -> Reading:
    """The config of a file with {"optim.lr": "0.001"} set in it.

    `path` is FILE.py, whose `get_config()` is run, FILE.py:ARGUMENT, for `get_config(argument)`, or
    a JSON file. What is missing in it has its default, and a note says so. A run's own config.json
    may be of another version: fields that were renamed keep their values, those that are gone are
    left out, and notes name both.

    Raises:
      UserError: no such file, no get_config in it, or one that fails.
      UserErrors: all unknown fields (with the nearest ones), values of another type or out of
        range, and fields that contradict each other.
    """
    stated, of_run = _read_file(path)
    task = str(stated.get("task", "classification"))
    table = _table(task)
    stated = {n: v for n, v in stated.items() if n in table or not isinstance(v, dict)}
    problems, notes, values = [], [], {name: field.default for name, field in table.items()}
    for old, new in RENAMED.items() if of_run else ():
        if old in stated and new in table:
            value = stated.pop(old)
            kept = (
                "keeps its value" if new not in stated else f"{new} has one already, which counts"
            )
            stated.setdefault(new, value)
            notes.append(f"{path}: {old} is {new} now, and {kept}")
    strange = sorted(stated.keys() - table.keys())
    if of_run and strange:
        notes.append(f"{path} has fields that this version has not, left out: {_list(strange)}")
    elif strange:
        problems += [f"{path}: {unknown(name, table)}" for name in strange]
    origins = dict.fromkeys(table, FILLED_IN if of_run else DEFAULT)
    for name in stated.keys() & table.keys():
        try:
            values[name] = cast(table[name], stated[name])
        except UserError as error:
            problems.append(f"{path}: {error}")
        if of_run or values[name] != table[name].default:
            origins[name] = RUN if of_run else FILE
    if of_run and values["recipes"] != (ordered := _in_order(values["recipes"])):
        values["recipes"] = ordered  # a run of a version that applied them so, whatever was written
        notes.append(f"{path}: recipes are {ordered!r}, in the order in which they were applied")
    if missing := [name for name in table if name not in stated]:
        notes.append(f"{path} lacks fields, which have their defaults: {_fill(missing, values)}")
    problems += _override(values, table, overrides)
    origins |= dict.fromkeys(overrides, COMMAND_LINE)
    if values["task"] != task:
        problems.append(f"config.task: {path} is a config of {task}: take one of {values['task']}")
        values["task"] = task
    if "optim.warmup_steps" not in overrides and (fitted := _fit_warmup(values, table, stated)):
        notes += fitted
        origins["optim.warmup_steps"] = FILLED_IN
    problems += check_values(values)
    if problems:
        raise UserErrors(problems)
    return Reading(_nested(values), tuple(notes), origins)


def config_without_file(task: str, overrides: Mapping[str, str]) -> ConfigDict:
    """`default_config` with {"evaluate.score": "0.3"} set in it, checked as a file's.

    Raises:
      UserErrors: all unknown fields, and values of another type or out of range.
    """
    table = _table(task)
    values = {name: field.default for name, field in table.items()}
    problems = _override(values, table, overrides)
    _fit_warmup(values, table, {})
    if problems := [*problems, *check_values(values)]:
        raise UserErrors(problems)
    return _nested(values)


def _override(
    values: dict[str, Value], table: Mapping[str, Field], overrides: Mapping[str, str]
) -> list[str]:
    """Sets what a command line says; returns what is wrong with it."""
    problems = []
    for name, text in overrides.items():
        try:
            if name not in table:
                raise UserError(unknown(name, table))
            values[name] = _parse(table[name], text, values[name])
        except UserError as error:
            problems.append(str(error))
    return problems


def fields(config: ConfigDict) -> dict[str, Value]:
    """All fields by dotted name.

    Examples:
      >>> fields(ConfigDict({"seed": 0, "optim": {"lr": 0.1}}))
      {'optim.lr': 0.1, 'seed': 0}
    """
    found: dict[str, Value] = {}
    for name in sorted(config):
        value = config[name]
        if isinstance(value, ConfigDict):
            found |= {f"{name}.{below}": leaf for below, leaf in fields(value).items()}
        else:
            found[name] = value
    return found


def replaced(config: ConfigDict, values: Mapping[str, Value]) -> ConfigDict:
    """A copy with fields at other values, by dotted name; they are not checked."""
    return _nested({**fields(config), **values})


def check_ranges(config: ConfigDict) -> None:
    """Checks what can be told from the fields alone, before any file is opened.

    Raises:
      UserErrors: all fields that are out of range or contradict each other.
    """
    if problems := check_values(fields(config)):
        raise UserErrors(problems)


def check_values(values: Mapping[str, Value]) -> list[str]:
    """What is wrong with fields by name: those out of range, and those that do not go together."""
    table = _table(values["task"])
    wrong = {
        name: f"config.{name} is {values[name]!r}: it must be {field.check.wanted}"
        for name, field in table.items()
        if name in values and not field.check.fits(values[name])
    }
    sound = {**values, **{name: table[name].default for name in wrong}}
    return [*wrong.values()] + [
        message
        for names, fits, message in _relations(sound)
        if not fits and not wrong.keys() & {*names.split()}
    ]


def _relations(values: Mapping[str, Value]) -> list[tuple[str, bool, str]]:
    """(several fields, whether they go together, what to say if they do not)."""
    steps, warmup = values["total_steps"], values["optim.warmup_steps"]
    updates = steps * updates_a_step(values)
    batch, parts = values["batch_size"], values["optim.accumulate"]
    lora, ordered = "lora" in values["recipes"], _in_order(values["recipes"])
    return [
        (
            "recipes",
            values["recipes"] == ordered,
            f"config.recipes is {values['recipes']!r}, and recipes are applied in their order: "
            "quantization first, then adapters on it, for they change what trains, then teachers, "
            "for they see the image as "
            f"it is, then attacks, for they maximize all that is minimized: write {ordered!r}",
        ),
        (
            "optim.warmup_steps total_steps recipes adversarial.replays",
            warmup <= updates,
            f"config.optim.warmup_steps is {warmup} and the run has {updates} updates "
            f"(config.total_steps {steps}): shorten the warm-up or train longer",
        ),
        (
            "adversarial.warmup_steps total_steps recipes adversarial.replays",
            "adversarial" not in values["recipes"] or values["adversarial.warmup_steps"] <= updates,
            f"config.adversarial.warmup_steps is {values['adversarial.warmup_steps']} and the run "
            f"has {updates} updates: its epsilon would never be reached",
        ),
        (
            "batch_size optim.accumulate",
            batch % parts == 0,
            f"config.batch_size {batch} does not divide into config.optim.accumulate {parts} parts",
        ),
        (
            "data.eval data.holdout",
            bool(values["data.eval"]) or 0 < values["data.holdout"] < 1,
            f"config.data.holdout is {values['data.holdout']}: without config.data.eval it must be "
            "a share between 0 and 1, say 0.1",
        ),
        (
            "recipes lora.rules lora.init_from",
            not lora or bool(values["lora.rules"] or values["lora.init_from"]),
            "config.recipes has lora: set config.lora.rules, or lora.init_from",
        ),
        (
            "recipes lora.rules lora.init_from",
            not lora or not (values["lora.rules"] and values["lora.init_from"]),
            "config.lora.init_from brings its own targets: set config.lora.rules=()",
        ),
        (
            "recipes quantize.form quantize.activations quantize.train",
            "quantize" not in values["recipes"]
            or values["quantize.form"] == "int8"
            or not (values["quantize.train"] or values["quantize.activations"] == "int8"),
            "config.quantize.train and quantize.activations are of int8: set "
            "config.quantize.form=int8",
        ),
        (
            "recipes quantize.train",
            not (lora and "quantize" in values["recipes"] and values["quantize.train"]),
            "config.quantize.train trains the kernels themselves, and lora leaves them as they are:"
            " take one of both",
        ),
    ]


def _in_order(recipes: tuple[str, ...]) -> tuple[str, ...]:
    """Recipes in the order in which they can be applied; unknown ones are for another check."""
    return tuple(sorted(recipes, key=[*RECIPES, *recipes].index))


def differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """Fields that differ, as "optim.lr: 0.001 -> 0.002"."""
    before, after = fields(old), fields(new)
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


# Files ------------------------------------------------------------------------------------------


def find_config(path: str) -> Path:
    """The file that `path` names: as it stands, or configs/NAME.py of those that come along.

    Raises:
      UserError: no such file.
    """
    if files.expand(path).is_file():
        return files.expand(path)
    shipped = shipped_configs()
    if Path(path).as_posix() in shipped:
        return shipped[Path(path).as_posix()]
    if "=" in path:
        raise UserError(f"--config={path}: fields are set with --config.FIELD=VALUE")
    hint = nearest(path, list(shipped)) or f"; the package brings {', '.join(sorted(shipped))}"
    raise UserError(f"--config: there is no file {path}{hint}")


def shipped_configs() -> dict[str, Path]:
    """The files of the configs that come along, by "configs/NAME.py"."""
    return {
        f"configs/{file.name}": file
        for folder in reversed(CONFIGS)
        for file in sorted(folder.glob("[!_]*.py"))
    }


def _read_file(path: str) -> tuple[dict[str, Value], bool]:
    """(fields by name, whether a run wrote them)."""
    argument = ""
    if not files.expand(path).is_file():
        path, _, argument = path.partition(":")
    file = find_config(path)
    if file.suffix == ".json":
        of_run = file.name == "config.json" and (file.parent / "model.json").is_file()
        return _flatten(read_json(file)), of_run
    try:
        namespace = runpy.run_path(str(file))
        if "get_config" not in namespace:
            raise UserError(f"--config: {path} defines no get_config()")
        get_config = namespace["get_config"]
        if argument and not inspect.signature(get_config).parameters:
            raise UserError(f"--config: {path} takes no argument; what is {argument!r}?")
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"--config: {path} is no Python file: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the file does wrong is its author's to mend
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        place = f"{path}:{frames[-1].lineno}" if frames else path
        reason = str(error).splitlines()[0] if str(error) else ""
        absent = re.match(r"\W*(?:Key )?\W*(\w+)\W*(?:does not exist|$)", reason)
        if isinstance(error, AttributeError) and absent:  # what a ConfigDict says of its fields
            known = {name: field for task in TASKS for name, field in fields_of(task).items()}
            reason = unknown(_with_section(absent[1], frames, known), known)
        raise UserError(f"--config: {place}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {path} must return a ConfigDict")
    return fields(config), False


def _with_section(
    name: str, frames: Sequence[traceback.FrameSummary], known: Collection[str]
) -> str:
    """The dotted name of a field that a line of a file sets by `config.optim.rates = ...`."""
    line = (frames[-1].line or "") if frames else ""
    written = re.search(rf"(\w+)\.{name}\b", line)
    section = written[1] if written else ""
    inside = any(one.startswith(f"{section}.") for one in known)
    return f"{section}.{name}" if inside else name


def _flatten(record: Mapping[str, Any], above: str = "") -> dict[str, Value]:
    """`fields` of a JSON object, whose keys may be dotted names too."""
    found: dict[str, Value] = {}
    for key, value in record.items():
        name = above + key
        section = isinstance(value, dict) and value
        found |= _flatten(value, f"{name}.") if section else {name: value}
    return found


def save_config(config: ConfigDict, path: Path) -> None:
    """Writes the config as JSON, to be read again by `load_config`."""
    write_json(config.to_dict(), path)


def write_json(record: Any, path: Path) -> None:
    """Writes a JSON file, whole or not at all."""
    files.write_whole((json.dumps(record, indent=2) + "\n").encode(), path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote, lists as tuples: JSON has none, and configs have no lists.

    Raises:
      UserError: the file is damaged.
    """
    record = files.read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return _tuples(record)


def _tuples(value: Value) -> Value:
    if isinstance(value, dict):
        return {name: _tuples(below) for name, below in value.items()}
    return tuple(_tuples(below) for below in value) if isinstance(value, list) else value


# Values -----------------------------------------------------------------------------------------


def _table(task: str) -> dict[str, Field]:
    if task not in TASKS:
        raise UserError(f"config.task: {task!r} is none of {', '.join(TASKS)}")
    return fields_of(task)


def _nested(values: Mapping[str, Value]) -> ConfigDict:
    config = ConfigDict()
    for name, value in values.items():
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            if parent not in section:
                section[parent] = ConfigDict()
            section = section[parent]
        section[last] = value
    return config.lock()


def unknown(name: str, table: Mapping[str, Field]) -> str:
    """What to say of a field that there is not, with the one that was meant."""
    others = [task for task in TASKS if RENAMED.get(name, name) in fields_of(task)]
    if others and RENAMED.get(name, name) not in table:
        return f"unknown config key `{name}`: it is a field of {', '.join(others)}"
    return f"unknown config key `{name}`{suggest(name, list(table))}"


def cast(field: Field, value: Value) -> Value:
    """`value` with the type of the field; whole numbers pass for floats and the reverse.

    Raises:
      UserError: it has another type.
    """
    like = field.default
    if isinstance(like, float) and type(value) is int and abs(value) < 2**63:
        return float(value)
    if type(like) is int and type(value) is float and value.is_integer():
        return int(value)
    if isinstance(like, tuple) and isinstance(value, list):
        return _tuples(value)
    if type(value) is not type(like):
        raise UserError(f"config.{field.name} is {value!r}: it takes {type(like).__name__}")
    return value


def _parse(field: Field, text: str, now: Value) -> Value:
    """The value that `text` spells, of the type of the field."""
    like = field.default
    if isinstance(like, str):
        quoted = len(text) > 1 and text[0] in "'\"" and text[-1] == text[0]
        text = text[1:-1] if quoted else text
        if text == "None":
            raise UserError(
                f"config key `{field.name}` takes text, not None: --config.{field.name}= is empty"
            )
        return text
    try:
        value = read_literal(text)
    except ValueError:
        value = text
    if isinstance(like, tuple) and not isinstance(value, tuple | bool | None):
        value = (value,) if value != "" else ()  # a single rule needs no Python quoting
    try:
        return cast(field, value)
    except UserError:
        raise UserError(
            f"config key `{field.name}` takes {type(like).__name__} (now {now!r}), not {text!r}"
        ) from None


def updates_a_step(values: Mapping[str, Value]) -> int:
    """Updates of the parameters a step, by all fields: several in free adversarial training."""
    free = "adversarial" in values["recipes"] and values["adversarial.method"] == "free"
    return values["adversarial.replays"] if free else 1


def _fit_warmup(
    values: dict[str, Value], table: Mapping[str, Field], stated: Mapping[str, Value]
) -> list[str]:
    """Shortens a warm-up that nobody asked for where the run is shorter; returns what to say."""
    warmup, total = values["optim.warmup_steps"], values["total_steps"]
    updates = total * updates_a_step(values)
    lengths = [stated.get("total_steps", 0), table["total_steps"].default]
    usual = next((n for n in lengths if type(n) is int and warmup <= n), None)
    if warmup <= updates or usual is None:
        return []
    values["optim.warmup_steps"] = shorter = warmup * total // usual
    return [
        f"optim.warmup_steps is {shorter} and not {warmup}, for total_steps is {total} and not "
        f"{usual}; --config.optim.warmup_steps sets another"
    ]


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _fill(missing: Sequence[str], values: Mapping[str, Value]) -> str:
    """Missing fields with their defaults, whole sections by their names."""
    sections: dict[str, list[str]] = {}
    for name in missing:
        sections.setdefault(name.partition(".")[0], []).append(name)
    parts = []
    for section, names in sections.items():
        whole = [name for name in values if name.startswith(f"{section}.")]
        parts += [f"{section}.*"] if whole == names else [f"{n} = {values[n]!r}" for n in names]
    return _list(parts)
