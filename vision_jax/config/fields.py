"""Every field of a config once: its default, what it must be, and a line of help.

A config is these fields with what its file changes. `vision_jax --help-config` prints them.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

Value = Any

# What there is to choose from, the one list of each; modules are imported when a run needs them.
TASKS = {  # see tasks/api.py
    "classification": "vision_jax.tasks.classification.task",
    "detection": "vision_jax.tasks.detection.task",
}
RECIPES = {  # see recipes/recipe.py; in the order in which they can be applied
    "lora": "vision_jax.recipes.lora",
    "distill": "vision_jax.recipes.distillation.recipe",
    "adversarial": "vision_jax.recipes.adversarial.recipe",
}
CLASSIFICATION, DETECTION = "classification", "detection"
# What distill.features may compare (recipes/distillation/objective.py).
FEATURES = (
    "hint",
    "attention_transfer",
    "attention_maps",
    "patch_tokens",
    "relational_distance",
    "relational_angle",
)


@dataclass(frozen=True)
class Check:
    """What a value must be beside its type: the test, and "it must be `wanted`"."""

    fits: Callable[[Value], bool]
    words: str | Callable[[], str]

    @property
    def wanted(self) -> str:
        return self.words if isinstance(self.words, str) else self.words()


@dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      name: with the section's, "optim.lr".
      default: what it is where nobody says otherwise; also its type.
      check: what a value must be.
      help: one line.
      tasks: that have it; None for all there are.
      instead: defaults of other tasks, by task.
    """

    name: str
    default: Value
    check: Check
    help: str
    tasks: tuple[str, ...] | None = None
    instead: Mapping[str, Value] = field(default_factory=dict)


# What values must be ----------------------------------------------------------------------------


def one_of(*names: str) -> Check:
    """One of these texts."""
    return _one_of(names)


def _one_of(names: Collection[str]) -> Check:
    """`one_of` a collection that may grow."""

    def words() -> str:
        *most, last = names
        return f"{', '.join(most)} or {last}"

    return Check(lambda value: value in names, words)


def _every(fits: Callable[[Value], bool]) -> Callable[[Value], bool]:
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
ABOVE_0 = Check(lambda value: 0 < value < math.inf, "above 0, and finite")
BELOW_1 = Check(lambda value: 0 <= value < 1, "at least 0 and below 1")
UP_TO_1 = Check(lambda value: 0 < value <= 1, "above 0 and at most 1")
SHARE = Check(lambda value: 0 <= value <= 1, "between 0 and 1")
AXIS = Check(lambda value: value == -1 or 1 <= value < MOST, "at least 1, or -1 for what is left")
RULES = Check(_every(_is_regex), "a tuple of regular expressions")
PAIRS = Check(_every(_is_pair), "a tuple of pairs, each with a name first")
WORDS = Check(_every(lambda value: isinstance(value, str)), "a tuple of texts")
CHANNELS = Check(_every(_is_number), "a number for each channel, or ()")
COUNTS = Check(
    lambda values: len(values) > 0 and all(type(x) is int and 0 < x < MOST for x in values),
    "positive whole numbers",
)
EPSILONS = Check(_every(lambda value: _is_number(value) and value > 0), "numbers above 0")

FILTERS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")  # data/transforms.py
FILTER = Check(lambda value: value in ("", *FILTERS), f"{', '.join(FILTERS)}, or empty")
SEED = Check(lambda value: 0 <= value < 2**32, "at least 0 and below 2**32")
RECIPE_NAMES = Check(
    lambda names: all(name in RECIPES and names.count(name) == 1 for name in names),
    lambda: f"a tuple of {', '.join(RECIPES)}, each at most once",
)
ROWS = Check(
    lambda value: _every(_is_row)(value) and len(dict(value)) == len(value),
    "a tuple of (row, indices or how many), each row once",
)
TEACHERS = Check(WORDS.fits, "a tuple of finished runs or weights")
NUMBERS = Check(_every(_is_number), "a number for each teacher, or ()")
MATCHES = Check(
    _every(_is_match),
    "a tuple of (kind, layer, teacher's layer, weight), kind being one of " + ", ".join(FEATURES),
)
MULTIPLIERS = Check(_every(_is_multiplier), "a tuple of pairs (path regex, factor)")
SHORTS = Check(
    _every(lambda value: type(value) is int and 0 < value < MOST), "positive whole numbers, or ()"
)
AREAS = Check(_are_areas, "two shares of the image's area, the smaller first")
SEVERITIES = Check(
    lambda values: len(values) > 0 and all(type(x) is int and 1 <= x <= 5 for x in values),
    "whole numbers from 1 to 5",
)


def _field(
    name: str, default: Value, check: Check, help: str, *tasks: str, **instead: Value
) -> Field:
    return Field(name, default, check, help, tasks or None, instead)


# The fields -------------------------------------------------------------------------------------

FIELDS = (
    _field("task", CLASSIFICATION, _one_of(TASKS), "what the model learns"),
    _field("seed", 0, SEED, "of initialization, data order, augmentation and dropout"),
    _field("batch_size", 64, COUNT, "images per update, over all devices", detection=8),
    _field("total_steps", 1_000, COUNT, "updates", detection=10_000),
    _field(
        "checkpoint_every",
        100,
        COUNT,
        "updates; evaluations and the end are checkpointed too",
        detection=500,
    ),
    _field("log_every", 10, COUNT, "updates between lines in metrics.jsonl"),
    _field("mesh.data", -1, AXIS, "devices that split the batch alone; -1 takes what is left"),
    _field("mesh.fsdp", 1, AXIS, "devices that split the parameters too"),
    _field(
        "sharding_rules", (), PAIRS, "(path regex, mesh axes) before the default; docs/training.md"
    ),
    _field("trainable", (".*",), RULES, "what trains besides adapters: regexes over whole paths"),
    _field(
        "recipes",
        (),
        RECIPE_NAMES,
        "what is on, each with the section of its name",
    ),
    # The model.
    _field(
        "model.weights",
        "",
        ANY,
        "embedded:NAME, a file, a Hugging Face folder, hf://owner/name, ...; empty: random",
    ),
    _field(
        "model.allow_pickle",
        False,
        ANY,
        "read .pth and .bin files too (needs torch; only if you trust them)",
    ),
    _field(
        "model.variant",
        "",
        ANY,
        "such as b/16, resnet50, detr_resnet50; empty: the weights' own architecture",
    ),
    _field("model.arguments", (), PAIRS, "more of the model's, as ((name, value), ...)"),
    _field(
        "model.layers",
        (),
        ROWS,
        "what a smaller student keeps of bigger weights; docs/distillation.md",
    ),
    _field("model.width", 0, FROM_0, "of a narrower ViT, cut out of wider weights; 0 keeps theirs"),
    _field("model.mlp_width", 0, FROM_0, "likewise"),
    _field(
        "model.reinitialize",
        ("head(_dist)?/.*",),
        RULES,
        "paths not taken from the weights: another set of classes",
        detection=(r"(proposals_\d+/)?class_head/.*",),
    ),
    _field(
        "model.drop",
        (),
        RULES,
        "tensors of the weights to leave out on purpose, by their own names",
    ),
    _field(
        "model.image_size", 0, FROM_0, "of square images, pixels a side; 0 takes the weights' own"
    ),
    _field(
        "model.mean",
        (),
        CHANNELS,
        "of images in [0, 1], per channel; () takes the weights' own, or 0.5",
    ),
    _field("model.std", (), CHANNELS, "likewise"),
    _field(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "compute dtype; parameters are float32. bfloat16 on GPU and TPU",
    ),
    _field("model.dropout", 0.0, BELOW_1, "probability"),
    _field(
        "model.drop_path",
        0.0,
        BELOW_1,
        "stochastic depth of the last block; grows linearly up to it",
    ),
    _field("model.freeze_norm", False, ANY, "BatchNorm keeps its running statistics in training"),
    _field(
        "model.remat",
        False,
        ANY,
        "recompute activations in the backward pass: less memory, more time",
    ),
    _field(
        "model.scan",
        False,
        ANY,
        "one compiled block in a loop: quicker to compile, slightly slower to run",
    ),
    # Adapters.
    _field("lora.rules", (), RULES, "kernels that get an adapter: regexes over whole paths"),
    _field("lora.rank", 8, COUNT, "of the update"),
    _field("lora.alpha", 16.0, ABOVE_0, "the update is scaled by alpha / rank"),
    _field("lora.rank_stabilized", False, ANY, "by alpha / sqrt(rank) instead"),
    _field("lora.dropout", 0.0, BELOW_1, "on the adapter's input"),
    _field("lora.dora", False, ANY, "train each output's magnitude too (DoRA)"),
    _field(
        "lora.qkv_parts",
        "",
        ANY,
        "q,v: adapters of their own for these parts of a fused qkv kernel",
    ),
    _field(
        "lora.init_from", "", ANY, "a folder with a PEFT adapter to start from, instead of rules"
    ),
    # Adversarial training.
    _field(
        "adversarial.method",
        "pgd",
        one_of("pgd", "fast", "free", "trades", "mart"),
        "of detectors the first three",
    ),
    _field("adversarial.norm", "linf", one_of("linf", "l2"), "of perturbations"),
    _field("adversarial.epsilon", 4 / 255, ABOVE_0, "their largest norm; images are in [0, 1]"),
    _field("adversarial.steps", 3, COUNT, "of each attack (fast and free have one)"),
    _field(
        "adversarial.step",
        0.0,
        NOT_NEGATIVE,
        "its length as a share of epsilon; 0 takes the method's usual one",
    ),
    _field("adversarial.beta", 6.0, NOT_NEGATIVE, "weight of the divergence, of trades and mart"),
    _field(
        "adversarial.replays",
        4,
        Check(lambda value: 2 <= value < MOST, "at least 2"),
        "updates a batch, of free",
    ),
    _field(
        "adversarial.weight_epsilon",
        0.0,
        NOT_NEGATIVE,
        "kernels are shifted too, by this share of their norm (AWP)",
    ),
    _field(
        "adversarial.warmup_steps", 0, FROM_0, "updates over which epsilon grows linearly from 0"
    ),
    _field(
        "adversarial.watch",
        200,
        FROM_0,
        "held-out images attacked in each evaluation; 0 for none",
        CLASSIFICATION,
    ),
    # Learning from teachers.
    _field(
        "distill.teachers",
        (),
        TEACHERS,
        "finished runs, or weights as in model.weights; ema: the student's own average",
    ),
    _field("distill.teacher_weights", (), NUMBERS, "of several teachers; () for equal ones"),
    _field(
        "distill.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "that teachers are kept and compute in",
    ),
    _field(
        "distill.logits",
        "soft",
        one_of("soft", "hard", "decoupled", "queries", "none"),
        "what is learned of them; of detectors queries or none",
        detection="queries",
    ),
    _field("distill.temperature", 4.0, ABOVE_0, "of the soft and decoupled logits", detection=1.0),
    _field(
        "distill.weight", 0.5, SHARE, "of the logits' loss; that of the labels has the rest of 1"
    ),
    _field(
        "distill.token",
        False,
        ANY,
        "the teachers teach the distillation token, the labels the other (DeiT)",
    ),
    _field(
        "distill.features",
        (),
        MATCHES,
        "((kind, layer, layer of the first teacher, weight), ...); docs/distillation.md",
    ),
    _field(
        "distill.top_k",
        0,
        FROM_0,
        "the teachers' best logits that are kept, for a smaller cache; 0 for all",
    ),
    _field(
        "distill.cache",
        "",
        ANY,
        "a file of what they say, written by cache-teacher; empty: they are asked",
    ),
    # The optimizer.
    _field(
        "optim.name", "adamw", one_of("adamw", "sgd", "lars", "lamb", "lion", "muon"), "the rule"
    ),
    _field("optim.lr", 1e-3, NOT_NEGATIVE, "the peak of the learning rate", detection=1e-4),
    _field(
        "optim.schedule",
        "cosine",
        one_of("cosine", "linear", "constant", "step"),
        "of the rate, after the warm-up",
    ),
    _field("optim.warmup_steps", 100, FROM_0, "updates over which the rate rises to its peak"),
    _field(
        "optim.drop_at", 2 / 3, UP_TO_1, "share of the updates after which step falls to a tenth"
    ),
    _field(
        "optim.weight_decay",
        0.05,
        NOT_NEGATIVE,
        "on kernels and adapters, not on biases, norms and embeddings",
        detection=1e-4,
    ),
    _field("optim.b1", 0.9, BELOW_1, "decay of the first moment"),
    _field("optim.b2", 0.999, BELOW_1, "decay of the second moment"),
    _field("optim.momentum", 0.9, BELOW_1, "of sgd, lars, muon"),
    _field(
        "optim.clip_norm",
        1.0,
        NOT_NEGATIVE,
        "largest global gradient norm; 0 turns clipping off",
        detection=0.1,
    ),
    _field(
        "optim.layer_decay", 1.0, UP_TO_1, "each earlier layer's rate is this times the next one's"
    ),
    _field(
        "optim.lr_multipliers",
        (),
        MULTIPLIERS,
        "(path regex, factor of the rate); the first that matches counts",
    ),
    _field("optim.accumulate", 1, COUNT, "micro-batches per update"),
    _field(
        "optim.ema_decay",
        0.0,
        BELOW_1,
        "moving average of what trains, used by evaluation; 0 for none",
    ),
    # The data.
    _field("data.train", "", ANY, "what docs/data.md and docs/detection_data.md list"),
    _field(
        "data.images", "", ANY, "folder of the images; empty: the annotation file's own", DETECTION
    ),
    _field("data.eval", "", ANY, "likewise; empty: a share of data.train is held out"),
    _field("data.eval_images", "", ANY, "empty: as data.images", DETECTION),
    _field("data.holdout", 0.1, SHARE, "that share"),
    _field(
        "data.subset",
        0,
        FROM_0,
        "train on this many images only, the classes in equal parts; 0 takes all",
    ),
    _field(
        "data.short",
        0,
        FROM_0,
        "pixels of the short side, unless the long one exceeds longest; 0: the weights' own",
        DETECTION,
    ),
    _field(
        "data.longest",
        0,
        FROM_0,
        "most pixels of the long side; 0: the weights' own, 1333 of DETR's",
        DETECTION,
    ),
    _field(
        "data.buckets",
        5,
        COUNT,
        "canvases that images are padded to: one compilation for each that occurs",
        DETECTION,
    ),
    _field(
        "data.crop_pct",
        0.0,
        SHARE,
        "evaluation view: center crop of this share; 0 takes the weights' own",
        CLASSIFICATION,
    ),
    _field("data.interpolation", "", FILTER, "of resizing; empty: the weights' own"),
    _field(
        "data.max_boxes",
        100,
        COUNT,
        "an image, at most the model's queries; the largest are kept",
        DETECTION,
    ),
    _field(
        "data.shorts",
        (),
        SHORTS,
        "training view: short sides, one drawn a batch; () for data.short alone",
        DETECTION,
    ),
    _field(
        "data.crop",
        "random_resized",
        one_of("random_resized", "pad", "none"),
        "training view; pad shifts by 1/8",
        CLASSIFICATION,
    ),
    _field(
        "data.crop_scale",
        (0.08, 1.0),
        AREAS,
        "area of a random_resized crop, as a share of the image",
        CLASSIFICATION,
    ),
    _field(
        "data.crop",
        0.5,
        SHARE,
        "training view: the share of images of which a window is cut out",
        DETECTION,
    ),
    _field("data.flip", True, ANY, "horizontally, half of the images"),
    _field("data.brightness", 0.0, NOT_NEGATIVE, "a factor drawn from 1 ± this", DETECTION),
    _field("data.contrast", 0.0, NOT_NEGATIVE, "likewise", DETECTION),
    _field("data.saturation", 0.0, NOT_NEGATIVE, "likewise", DETECTION),
    _field("data.threads", 2, COUNT, "that decode images"),
    _field("data.workers", 0, FROM_0, "processes that decode images; 0 uses threads alone"),
    _field("data.max_damaged", 0.01, SHARE, "stop when a larger share of the images can't be read"),
    # Augmentation, on the device.
    _field(
        "augment.policy",
        "none",
        one_of("none", "rand", "trivial"),
        "RandAugment, TrivialAugment",
        CLASSIFICATION,
    ),
    _field("augment.ops", 2, FROM_0, "of rand, per image", CLASSIFICATION),
    _field(
        "augment.magnitude",
        9,
        Check(lambda value: 0 <= value <= 30, "between 0 and 30"),
        "of rand",
        CLASSIFICATION,
    ),
    _field("augment.mixup", 0.0, NOT_NEGATIVE, "alpha; 0 turns it off", CLASSIFICATION),
    _field("augment.cutmix", 0.0, NOT_NEGATIVE, "likewise", CLASSIFICATION),
    _field("augment.erasing", 0.0, SHARE, "probability of random erasing", CLASSIFICATION),
    _field(
        "augment.label_smoothing",
        0.1,
        SHARE,
        "share of the label that goes to all classes",
        CLASSIFICATION,
    ),
    # A detector's loss: of pairs of query and box, to match them, then to train.
    _field("loss.class_cost", 1.0, NOT_NEGATIVE, "in the matching", DETECTION),
    _field("loss.l1_cost", 5.0, NOT_NEGATIVE, "in the matching", DETECTION),
    _field("loss.giou_cost", 2.0, NOT_NEGATIVE, "in the matching", DETECTION),
    _field("loss.class_weight", 1.0, NOT_NEGATIVE, "in the loss", DETECTION),
    _field("loss.l1_weight", 5.0, NOT_NEGATIVE, "in the loss", DETECTION),
    _field("loss.giou_weight", 2.0, NOT_NEGATIVE, "in the loss", DETECTION),
    _field(
        "loss.no_object_weight",
        0.1,
        NOT_NEGATIVE,
        "of a query without a box in DETR's class term; RF-DETR's has none",
        DETECTION,
    ),
    # Evaluation.
    _field(
        "evaluate.every",
        100,
        FROM_0,
        "updates, 0 for once an epoch; the end of training always evaluates",
        detection=0,
    ),
    _field("evaluate.batch_size", 100, COUNT, "images", detection=8),
    _field("evaluate.score", 0.5, SHARE, "boxes below it are not drawn", DETECTION),
    _field(
        "evaluate.patience",
        500,
        FROM_0,
        "updates after which predictions must not be empty or constant",
        DETECTION,
    ),
    _field(
        "evaluate.neighbors",
        (1, 20),
        COUNTS,
        "of probe: the k of nearest neighbours",
        CLASSIFICATION,
    ),
    _field(
        "evaluate.shots", (1, 5, 10), COUNTS, "and training images of each class", CLASSIFICATION
    ),
    _field("evaluate.repeats", 5, COUNT, "and random choices of them", CLASSIFICATION),
    # robustness, on a finished run.
    _field(
        "robustness.images",
        1_000,
        FROM_0,
        "evenly spread over the evaluation data; 0 takes all",
        detection=500,
    ),
    _field("robustness.batch_size", 100, COUNT, "images", detection=8),
    _field(
        "robustness.norm",
        "linf",
        one_of("linf", "l2", "l1"),
        "of what epsilons measure, in pixels from 0 to 1",
    ),
    _field(
        "robustness.epsilons", (1 / 255, 2 / 255, 4 / 255, 8 / 255), EPSILONS, "the largest norms"
    ),
    _field(
        "robustness.attacks",
        ("fgsm", "pgd"),
        WORDS,
        "of fgsm, pgd, mifgsm, difgsm, apgd-ce, apgd-dlr; of detectors the first two",
    ),
    _field("robustness.steps", 20, COUNT, "of each attack but fgsm", detection=10),
    _field("robustness.restarts", 1, COUNT, "of each attack but fgsm"),
    _field(
        "robustness.autoattack",
        "off",
        one_of("off", "standard", "plus", "rand"),
        "about 100 times PGD-20's time",
        CLASSIFICATION,
    ),
    _field("robustness.autoattack_epsilon", 8 / 255, ABOVE_0, "the largest norm", CLASSIFICATION),
    _field(
        "robustness.corruptions",
        ("all",),
        WORDS,
        "all, some of the 15 (docs/robustness.md), or ()",
        CLASSIFICATION,
    ),
    _field(
        "robustness.severities", (1, 2, 3, 4, 5), SEVERITIES, "of each corruption", CLASSIFICATION
    ),
    _field(
        "robustness.self_check",
        True,
        ANY,
        "look for signs of masked gradients, at the largest epsilon",
        CLASSIFICATION,
    ),
    _field(
        "robustness.transfer_from",
        "",
        ANY,
        "the workdir of another run, whose attacks are tried on this one",
        CLASSIFICATION,
    ),
)


def fields_of(task: str) -> dict[str, Field]:
    """The fields of a task by name, each with the default that it has there."""
    table = {
        one.name: replace(one, default=one.instead.get(task, one.default))
        for one in FIELDS
        if one.tasks is None or task in one.tasks
    }
    return table | {"task": replace(table["task"], default=task)}
