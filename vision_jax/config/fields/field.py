"""What a field is, what there is to choose from, and what values must be."""

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

Value = Any

# What there is to choose from, the one list of each; modules are imported when a run needs them.
TASKS = {  # see tasks/api.py
    "classification": "vision_jax.tasks.classification.task",
    "detection": "vision_jax.tasks.detection.task",
    "segmentation": "vision_jax.tasks.segmentation.task",
    "pretraining": "vision_jax.tasks.pretraining.task",
    "self_distillation": "vision_jax.tasks.self_distillation.task",
    "contrastive": "vision_jax.tasks.contrastive.task",
    "image_text": "vision_jax.tasks.image_text.task",
    "generation": "vision_jax.tasks.generation.task",
}
RECIPES = {  # see recipes/recipe.py; in the order in which they can be applied
    "mask": "vision_jax.recipes.mask",
    "quantize": "vision_jax.recipes.quantize",
    "lora": "vision_jax.recipes.lora",
    "distill": "vision_jax.recipes.distillation.recipe",
    "adversarial": "vision_jax.recipes.adversarial.recipe",
}
CLASSIFICATION, DETECTION, PRETRAINING = "classification", "detection", "pretraining"
SELF_DISTILLATION, CONTRASTIVE = "self_distillation", "contrastive"
IMAGE_TEXT, SEGMENTATION, GENERATION = "image_text", "segmentation", "generation"
MEASURED = (CLASSIFICATION, DETECTION, SEGMENTATION)  # tasks of `vision_jax quantize`
SHRUNK = (CLASSIFICATION, DETECTION)  # tasks of `vision_jax compress`
UNLABELLED = (PRETRAINING, SELF_DISTILLATION, CONTRASTIVE)
# What distill.features may compare (recipes/distillation/objective.py).
FEATURES = (
    "hint",
    "attention_transfer",
    "attention_maps",
    "patch_tokens",
    "relational_distance",
    "relational_angle",
)


# Kernels whose outputs are the model's: heads, box outputs.
HEADS = (r"(.*/)?((?!roi_)[a-z]+_)*head(_dist)?/.*kernel",)


@dataclasses.dataclass(frozen=True)
class Check:
    """What a value must be beside its type: the test, and "it must be `wanted`"."""

    fits: Callable[[Value], bool]
    words: str | Callable[[], str]

    @property
    def wanted(self) -> str:
        return self.words if isinstance(self.words, str) else self.words()


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      name: with the section's, "optim.lr".
      default: what it is where nobody says otherwise; also its type.
      check: what a value must be.
      help: what the field is, in one line that stands alone.
      tasks: that have it; None for all there are.
      instead: defaults of other tasks, by task.
    """

    name: str
    default: Value
    check: Check
    help: str
    tasks: tuple[str, ...] | None = None
    instead: Mapping[str, Value] = dataclasses.field(default_factory=dict)


# What values must be ----------------------------------------------------------------------------


def one_of(*names: str) -> Check:
    """A check that the value is one of these texts."""
    return any_of(names)


def any_of(names: Collection[str]) -> Check:
    """`one_of` a collection that may grow."""

    def words() -> str:
        *most, last = names
        return f"{', '.join(most)} or {last}"

    return Check(lambda value: value in names, words)


def every(fits: Callable[[Value], bool]) -> Callable[[Value], bool]:
    return lambda values: all(map(fits, values))


def _is_regex(value: Value) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def _is_number(value: Value) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_match(value: Value) -> bool:
    """(kind, layer, teacher's layer, weight)."""
    return (
        isinstance(value, tuple)
        and len(value) == 4
        and value[0] in FEATURES
        and all(isinstance(name, str) for name in value[1:3])
        and _is_number(value[3])
    )


def _is_pair(value: Value) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str)


def _is_row(value: Value) -> bool:
    """(row, indices) or (row, how many)."""
    if not _is_pair(value):
        return False
    return all(type(x) is int for x in (value[1] if isinstance(value[1], tuple) else value[1:]))


def _is_multiplier(value: Value) -> bool:
    return _is_pair(value) and _is_regex(value[0]) and _is_number(value[1])


def _are_areas(value: Value) -> bool:
    return len(value) == 2 and all(map(_is_number, value)) and 0 < value[0] <= value[1] <= 1


ANY = Check(lambda value: True, "anything")
MOST = 2**31  # of whole numbers: what JAX counts with
COUNT = Check(lambda value: 1 <= value < MOST, "at least 1 and below 2**31")
FROM_0 = Check(lambda value: 0 <= value < MOST, "at least 0 and below 2**31")
NOT_NEGATIVE = Check(lambda value: 0 <= value < math.inf, "at least 0, and finite")
NUMBER = Check(_is_number, "a finite number")
ABOVE_0 = Check(lambda value: 0 < value < math.inf, "above 0, and finite")
BELOW_1 = Check(lambda value: 0 <= value < 1, "at least 0 and below 1")
UP_TO_1 = Check(lambda value: 0 < value <= 1, "above 0 and at most 1")
INSIDE = Check(lambda value: 0 < value < 1, "above 0 and below 1")
SHARE = Check(lambda value: 0 <= value <= 1, "between 0 and 1")
AXIS = Check(lambda value: value == -1 or 1 <= value < MOST, "at least 1, or -1 for what is left")
MERGED = Check(
    lambda value: value == -1 or 0 <= value < 1 or (value < MOST and value == int(value) > 0),
    "a whole number, a share below 1, 0, or -1 for the weights' own",
)
RULES = Check(every(_is_regex), "a tuple of regular expressions")
PAIRS = Check(every(_is_pair), "a tuple of pairs, each with a name first")
TEMPLATES = Check(
    lambda values: (
        len(values) > 0 and all(isinstance(x, str) and x.count("{}") == 1 for x in values)
    ),
    "texts with {} once in each",
)
WORDS = Check(every(lambda value: isinstance(value, str)), "a tuple of texts")
CHANNELS = Check(every(_is_number), "a number for each channel, or ()")
COUNTS = Check(
    lambda values: len(values) > 0 and all(type(x) is int and 0 < x < MOST for x in values),
    "positive whole numbers",
)
EPSILONS = Check(every(lambda value: _is_number(value) and value > 0), "numbers above 0")

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # data/transforms.py
FILTER = Check(lambda value: value in ("", *FILTERS), f"{', '.join(FILTERS)}, or empty")
STORE = Check(
    lambda value: value == "" or value.startswith(("gs://", "s3://", "az://", "file://")),
    "empty, or begin with gs://, s3://, az:// or file://",
)
SEED = Check(lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
RECIPE_NAMES = Check(
    # A list, since what a file holds in a name's place may have no hash.
    lambda names: all(name in list(RECIPES) and names.count(name) == 1 for name in names),
    lambda: f"a tuple of {', '.join(RECIPES)}, each at most once",
)
ROWS = Check(
    lambda value: every(_is_row)(value) and len(dict(value)) == len(value),
    "a tuple of (row, indices or how many), each row once",
)
TEACHERS = Check(WORDS.fits, "a tuple of finished runs or weights")
NUMBERS = Check(every(_is_number), "a number for each teacher, or ()")
MATCHES = Check(
    every(_is_match),
    "a tuple of (kind, layer, teacher's layer, weight), kind being one of " + ", ".join(FEATURES),
)
WEIGHTS = Check(every(lambda value: _is_number(value) and value >= 0), "numbers of at least 0")
MULTIPLIERS = Check(every(_is_multiplier), "a tuple of pairs (path regex, factor)")
SHORTS = Check(
    every(lambda value: type(value) is int and 0 < value < MOST), "positive whole numbers, or ()"
)
AREAS = Check(_are_areas, "two shares of the image's area, the smaller first")
FACTORS = Check(
    lambda value: len(value) == 2 and all(map(_is_number, value)) and 0 < value[0] <= value[1],
    "two factors above 0, the smaller first",
)
SIGMAS = Check(
    lambda value: value == () or FACTORS.fits(value),
    "two standard deviations above 0, the smaller first, or ()",
)
SEVERITIES = Check(
    lambda values: len(values) > 0 and all(type(x) is int and 1 <= x <= 5 for x in values),
    "whole numbers from 1 to 5",
)


def field(
    name: str, default: Value, check: Check, help: str, *tasks: str, **instead: Value
) -> Field:
    """A field of these tasks, or of all, with defaults by task."""
    return Field(name, default, check, help, tasks or None, instead)
