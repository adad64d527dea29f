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
    "segmentation": "vision_jax.tasks.segmentation.task",
    "pretraining": "vision_jax.tasks.pretraining.task",
    "self_distillation": "vision_jax.tasks.self_distillation.task",
    "contrastive": "vision_jax.tasks.contrastive.task",
    "image_text": "vision_jax.tasks.image_text.task",
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
IMAGE_TEXT, SEGMENTATION = "image_text", "segmentation"
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
      help: what the field is, in one line that stands alone.
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
    """A check that the value is one of these texts."""
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
INSIDE = Check(lambda value: 0 < value < 1, "above 0 and below 1")
SHARE = Check(lambda value: 0 <= value <= 1, "between 0 and 1")
AXIS = Check(lambda value: value == -1 or 1 <= value < MOST, "at least 1, or -1 for what is left")
RULES = Check(_every(_is_regex), "a tuple of regular expressions")
PAIRS = Check(_every(_is_pair), "a tuple of pairs, each with a name first")
TEMPLATES = Check(
    lambda values: (
        len(values) > 0 and all(isinstance(x, str) and x.count("{}") == 1 for x in values)
    ),
    "texts with {} once in each",
)
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
    # A list, since what a file holds in a name's place may have no hash.
    lambda names: all(name in list(RECIPES) and names.count(name) == 1 for name in names),
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


def _field(
    name: str, default: Value, check: Check, help: str, *tasks: str, **instead: Value
) -> Field:
    return Field(name, default, check, help, tasks or None, instead)


# The fields -------------------------------------------------------------------------------------

FIELDS = (
    _field("task", CLASSIFICATION, _one_of(TASKS), "the task"),
    _field("seed", 0, SEED, "of initialization, data order, augmentation, dropout and attacks"),
    _field(
        "batch_size", 64, COUNT, "images per update, over all devices", detection=8, segmentation=8
    ),
    _field("total_steps", 1_000, COUNT, "updates of training", detection=10_000),
    _field(
        "checkpoint_every",
        100,
        COUNT,
        "updates between checkpoints; evaluations and the end are checkpointed too",
        detection=500,
    ),
    _field("log_every", 10, COUNT, "updates between lines in metrics.jsonl"),
    _field(
        "mesh.data", -1, AXIS, "devices that split the batch alone; -1 takes all that fsdp leaves"
    ),
    _field("mesh.fsdp", 1, AXIS, "devices that split the batch and the parameters (fully sharded)"),
    _field(
        "sharding_rules",
        (),
        PAIRS,
        "pairs (path regex, mesh axes), tried before the default; docs/training.md",
    ),
    _field(
        "trainable",
        (".*",),
        RULES,
        "parameters that train besides adapters: regexes over whole paths",
        pretraining=("(?!(decoder/)?pos_embed$).*",),
    ),
    _field(
        "recipes",
        (),
        RECIPE_NAMES,
        "the recipes that are on; each has the section of its name",
    ),
    # The model.
    _field(
        "model.weights",
        "",
        ANY,
        "pretrained: embedded:NAME, a file, a Hugging Face folder, hf://owner/name; empty: random",
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
    _field("model.arguments", (), PAIRS, "further arguments of the model, as ((name, value), ...)"),
    _field(
        "model.layers",
        (),
        ROWS,
        "what a smaller student keeps of bigger weights; docs/distillation.md",
    ),
    _field(
        "model.width",
        0,
        FROM_0,
        "channels of a narrower ViT, cut out of wider weights; 0 keeps the weights' own",
    ),
    _field(
        "model.mlp_width",
        0,
        FROM_0,
        "hidden units of its MLPs, cut out of wider weights; 0 keeps the weights' own",
    ),
    _field(
        "model.reinitialize",
        ("head(_dist)?/.*",),
        RULES,
        "parameters that start anew, such as the head of other classes: regexes over whole paths",
        detection=(r"((proposals|head)_\d+/)?class_head/.*",),
        segmentation=(r"(auxiliary_)?class_head/.*",),
        pretraining=("decoder/.*",),
        self_distillation=("(dino|ibot)_head/.*|mask_token|(patch_)?center",),
        contrastive=("contrastive_head/.*",),
        image_text=("text/.*|logit_(scale|bias)",),
    ),
    _field(
        "model.drop",
        (),
        RULES,
        "tensors of the weights to leave out: regexes over the file's own names",
    ),
    _field(
        "model.image_size", 0, FROM_0, "pixels a side of square images; 0 takes the weights' own"
    ),
    _field(
        "model.mean",
        (),
        CHANNELS,
        "mean of images in [0, 1] per channel; () takes the weights' own, or 0.5",
    ),
    _field(
        "model.std",
        (),
        CHANNELS,
        "standard deviation of images in [0, 1] per channel; () takes the weights' own, or 0.5",
    ),
    _field(
        "model.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "dtype of the computation; parameters are float32. bfloat16 is for GPU and TPU",
    ),
    _field("model.dropout", 0.0, BELOW_1, "probability of dropout"),
    _field(
        "model.drop_path",
        0.0,
        BELOW_1,
        "probability of stochastic depth in the last block; it grows linearly up to it",
    ),
    _field(
        "model.freeze_norm",
        False,
        ANY,
        "BatchNorm uses its running statistics in training and never updates them",
    ),
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
    # Sparse kernels.
    _field(
        "mask.form",
        "magnitude",
        one_of("magnitude", "2:4"),
        "which weights are zero: the smallest of a kernel, or two of each four inputs of an output",
    ),
    _field("mask.share", 0.5, SHARE, "of a kernel's weights that are zero, of magnitude"),
    _field("mask.rules", (".*kernel",), RULES, "kernels to mask: regexes over whole paths"),
    _field(
        "mask.keep",
        HEADS,
        RULES,
        "kernels that stay whole all the same, heads and box outputs at first; so does the first"
        " layer",
    ),
    # Quantization.
    _field(
        "quantize.form",
        "nf4",
        one_of("int8", "nf4"),
        "int8 with a scale an output, or 4-bit NormalFloat in blocks (QLoRA's)",
    ),
    _field("quantize.rules", (".*kernel",), RULES, "kernels to quantize: regexes over whole paths"),
    _field(
        "quantize.keep",
        HEADS,
        RULES,
        "kernels that stay in float all the same, heads and box outputs at first; so does the first"
        " layer",
    ),
    _field("quantize.block_size", 64, COUNT, "weights of an output that share a scale, of nf4"),
    _field("quantize.double", True, ANY, "quantize the scales too (double quantization), of nf4"),
    _field(
        "quantize.activations",
        "float",
        one_of("float", "int8"),
        "of int8: the layers' inputs too, by the scale that each row or image asks for",
    ),
    _field(
        "quantize.train",
        False,
        ANY,
        "of int8: train kernels that are rounded in the forward pass alone (QAT); else they are"
        " frozen",
    ),
    # Quantization of a finished run: `vision_jax quantize`.
    _field(
        "ptq.form", "int8", one_of("int8", "nf4"), "int8, or 4-bit NormalFloat in blocks", *MEASURED
    ),
    _field(
        "ptq.activations",
        "float",
        one_of("float", "dynamic", "static"),
        "of int8, the layers' inputs: float, int8 by each one's own scale, or by a calibrated one",
        *MEASURED,
    ),
    _field(
        "ptq.rules",
        (".*kernel",),
        RULES,
        "kernels to quantize: regexes over whole paths",
        *MEASURED,
    ),
    _field(
        "ptq.keep",
        HEADS,
        RULES,
        "kernels that stay in float all the same, heads and box outputs at first; so does the first"
        " layer",
        *MEASURED,
    ),
    _field(
        "ptq.block_size", 64, COUNT, "weights of an output that share a scale, of nf4", *MEASURED
    ),
    _field(
        "ptq.images",
        128,
        COUNT,
        "training images that ranges and errors are measured on",
        *MEASURED,
    ),
    _field(
        "ptq.observer",
        "mse",
        one_of("absmax", "percentile", "mse"),
        "how far a static scale reaches: the largest input, a percentile, the least squared error",
        *MEASURED,
    ),
    _field(
        "ptq.percentile",
        99.99,
        Check(lambda value: 0 < value <= 100, "above 0 and at most 100"),
        "percent of the inputs' magnitudes that are not clipped, of that observer",
        *MEASURED,
    ),
    _field(
        "ptq.max_error",
        0.05,
        NOT_NEGATIVE,
        "relative error of the outputs; the most sensitive layers, or their inputs, stay in float",
        *MEASURED,
    ),
    _field(
        "ptq.requantize",
        False,
        ANY,
        "merge adapters into a 4-bit base again, though rounding takes back what they learned",
        *MEASURED,
    ),
    # `vision_jax compress`: the one teacher pruned, taught by itself, trained for int8, exported.
    _field(
        "compress.keep",
        0.5,
        INSIDE,
        "share of each group of channels that stays",
        *SHRUNK,
    ),
    _field(
        "compress.what",
        (),
        WORDS,
        "kinds of channels to cut, of channels, inner, mlp, heads and layers; empty: all that are "
        "free where they are zero",
        *SHRUNK,
    ),
    _field(
        "compress.score",
        "taylor",
        one_of("magnitude", "taylor"),
        "what stays: the largest weights, or what the loss needs",
        *SHRUNK,
    ),
    _field(
        "compress.int8_steps",
        100,
        FROM_0,
        "updates with kernels, and inputs as of ptq.activations, rounded to int8; 0 rounds after"
        " training alone",
        *SHRUNK,
    ),
    _field("compress.int8_lr", 2e-4, ABOVE_0, "learning rate of these updates", *SHRUNK),
    _field(
        "compress.formats",
        ("onnx", "tflite"),
        Check(
            _every(one_of("stablehlo", "onnx", "tflite", "openvino").fits),
            "some of stablehlo, onnx, tflite and openvino",
        ),
        "formats of the files that are written and timed",
        *SHRUNK,
    ),
    # Adapters.
    _field("lora.rules", (), RULES, "kernels that get an adapter: regexes over whole paths"),
    _field("lora.rank", 8, COUNT, "rank of the adapters' update"),
    _field("lora.alpha", 16.0, ABOVE_0, "the update is scaled by alpha / rank"),
    _field(
        "lora.rank_stabilized",
        False,
        ANY,
        "scale the update by alpha / sqrt(rank) instead (rsLoRA)",
    ),
    _field("lora.dropout", 0.0, BELOW_1, "probability of dropout on an adapter's input"),
    _field("lora.dora", False, ANY, "train each output's magnitude too (DoRA)"),
    _field(
        "lora.qkv_parts",
        "",
        ANY,
        "parts of a fused qkv kernel with adapters of their own, such as q,v; empty: one for all",
    ),
    _field("lora.init_from", "", ANY, "folder of a PEFT adapter to start from, instead of rules"),
    # Adversarial training.
    _field(
        "adversarial.method",
        "pgd",
        one_of("pgd", "fast", "free", "trades", "mart"),
        "the method; detectors have the first three",
    ),
    _field("adversarial.norm", "linf", one_of("linf", "l2"), "norm that bounds a perturbation"),
    _field(
        "adversarial.epsilon",
        4 / 255,
        ABOVE_0,
        "largest norm of a perturbation; images are in [0, 1]",
    ),
    _field("adversarial.steps", 3, COUNT, "steps of each attack (fast and free have one)"),
    _field(
        "adversarial.step_size",
        0.0,
        NOT_NEGATIVE,
        "length of a step as a share of epsilon; 0 takes the method's usual one",
    ),
    _field("adversarial.beta", 6.0, NOT_NEGATIVE, "weight of the KL divergence in trades and mart"),
    _field(
        "adversarial.replays",
        4,
        Check(lambda value: 2 <= value < MOST, "at least 2"),
        "updates on each batch in free",
    ),
    _field(
        "adversarial.weight_epsilon",
        0.0,
        NOT_NEGATIVE,
        "size of the perturbation of kernels, as a share of their norm (AWP); 0 for none",
    ),
    _field(
        "adversarial.warmup_steps", 0, FROM_0, "updates over which epsilon grows linearly from 0"
    ),
    _field(
        "adversarial.watch",
        200,
        FROM_0,
        "held-out images that each evaluation attacks by FGSM and PGD; 0 for none",
        CLASSIFICATION,
    ),
    # Learning from teachers.
    _field(
        "distill.teachers",
        (),
        TEACHERS,
        "finished runs, or weights as in model.weights; ema: the student's own moving average",
    ),
    _field(
        "distill.teacher_weights",
        (),
        NUMBERS,
        "weights of several teachers' probabilities; () for equal ones",
    ),
    _field(
        "distill.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "dtype that teachers are kept in and compute in",
    ),
    _field(
        "distill.logits",
        "soft",
        one_of("soft", "hard", "decoupled", "queries", "detections", "cells", "none"),
        "loss of the teachers' logits; DETRs have queries, YOLOX detections or cells",
        detection="queries",
    ),
    _field(
        "distill.temperature",
        4.0,
        ABOVE_0,
        "temperature of soft, decoupled, queries and cells",
        detection=1.0,
    ),
    _field(
        "distill.weight",
        0.5,
        SHARE,
        "weight of the loss of the logits; that of the labels has the rest of 1",
    ),
    _field(
        "distill.least_score",
        0.3,
        SHARE,
        "score from which a teacher's detections are learned",
        DETECTION,
    ),
    _field(
        "distill.token",
        False,
        ANY,
        "teacher logits train the distillation token, labels the class token (DeiT)",
    ),
    _field(
        "distill.features",
        (),
        MATCHES,
        "((kind, layer, layer of the first teacher, weight), ...) to compare; docs/distillation.md",
    ),
    _field(
        "distill.top_k",
        0,
        FROM_0,
        "largest teacher logits that are kept, for a smaller cache; 0 for all",
    ),
    _field(
        "distill.cache",
        "",
        ANY,
        "file of cached teacher outputs, written by cache-teacher; empty: the teachers are run",
    ),
    # The optimizer.
    _field(
        "optim.name",
        "adamw",
        one_of("adamw", "sgd", "lars", "lamb", "lion", "muon"),
        "the optimizer",
    ),
    _field("optim.lr", 1e-3, NOT_NEGATIVE, "the peak of the learning rate", detection=1e-4),
    _field(
        "optim.schedule",
        "cosine",
        one_of("cosine", "linear", "constant", "step"),
        "the learning rate's schedule after the warm-up",
    ),
    _field(
        "optim.warmup_steps", 100, FROM_0, "updates over which the learning rate rises to its peak"
    ),
    _field(
        "optim.drop_at",
        2 / 3,
        UP_TO_1,
        "share of all updates after which the schedule step falls to a tenth",
    ),
    _field(
        "optim.weight_decay",
        0.05,
        NOT_NEGATIVE,
        "weight decay of kernels and adapters; biases, norms and embeddings have none",
        detection=1e-4,
        self_distillation=0.04,
    ),
    _field(
        "optim.final_weight_decay",
        0.0,
        NOT_NEGATIVE,
        "weight decay at the end of half a cosine; 0 keeps optim.weight_decay",
    ),
    _field("optim.b1", 0.9, BELOW_1, "decay of the first moment in adamw, lamb, lion and muon"),
    _field(
        "optim.b2",
        0.999,
        BELOW_1,
        "decay of the second moment in adamw, lamb, lion and muon",
        pretraining=0.95,
    ),
    _field("optim.momentum", 0.9, BELOW_1, "momentum of sgd, lars and muon"),
    _field(
        "optim.clip_norm",
        1.0,
        NOT_NEGATIVE,
        "largest global norm of the gradient; 0 turns clipping off",
        detection=0.1,
        self_distillation=3.0,
    ),
    _field(
        "optim.layer_decay",
        1.0,
        UP_TO_1,
        "each earlier layer's learning rate is this times the next one's",
    ),
    _field(
        "optim.lr_multipliers",
        (),
        MULTIPLIERS,
        "pairs (path regex, factor of the learning rate); the first that matches counts",
    ),
    _field("optim.accumulate", 1, COUNT, "micro-batches per update"),
    _field(
        "optim.ema_decay",
        0.0,
        BELOW_1,
        "decay of the moving average of what trains, which evaluation uses; 0 for none",
        self_distillation=0.996,
    ),
    # The data.
    _field(
        "data.train",
        "",
        ANY,
        "training data: see docs/data.md, docs/detection_data.md, docs/segmentation_data.md",
    ),
    _field(
        "data.images",
        "",
        ANY,
        "folder of the images; empty: the annotation file's own",
        *(DETECTION, SEGMENTATION),
    ),
    _field(
        "data.masks",
        "",
        ANY,
        "folder of the masks; empty: masks/ and the like, in data.train or beside it",
        SEGMENTATION,
    ),
    _field(
        "data.classes",
        "",
        ANY,
        "table of the masks' values, JSON or CSV; empty: classes.json beside the masks",
        SEGMENTATION,
    ),
    _field(
        "data.reduce_zero",
        False,
        ANY,
        "masks count classes from 1 and are 0 where there is none (ADE20K)",
        SEGMENTATION,
    ),
    _field(
        "data.targets",
        "semantic",
        one_of("semantic", "instance", "panoptic"),
        "what is to be found: the class of each pixel, the masks of things, or of things and stuff",
        SEGMENTATION,
    ),
    _field(
        "data.stuff",
        (),
        WORDS,
        "names of the classes without instances, as sky; () for what the data say",
        SEGMENTATION,
    ),
    _field(
        "data.max_segments",
        100,
        COUNT,
        "targets of an image there is room for, instance or panoptic; at most the model's queries",
        SEGMENTATION,
    ),
    _field("data.eval", "", ANY, "evaluation data; empty: a share of data.train is held out"),
    _field(
        "data.eval_masks",
        "",
        ANY,
        "folder of the evaluation masks; empty: found as data.masks is",
        SEGMENTATION,
    ),
    _field(
        "data.eval_images",
        "",
        ANY,
        "folder of the evaluation images; empty: as data.images",
        *(DETECTION, SEGMENTATION),
    ),
    _field(
        "data.holdout", 0.1, SHARE, "share of data.train that is held out where data.eval is empty"
    ),
    _field(
        "data.subset",
        0,
        FROM_0,
        "number of training images, the classes in equal parts; 0 takes all",
    ),
    _field(
        "data.exclude",
        "",
        ANY,
        "images to leave out of data.train: a file that vision_jax doctor --exclude wrote",
        CLASSIFICATION,
        *UNLABELLED,
        IMAGE_TEXT,
    ),
    _field(
        "data.short",
        0,
        FROM_0,
        "short side in pixels, unless the long one would exceed longest; 0: the weights' own",
        DETECTION,
    ),
    _field(
        "data.longest",
        0,
        FROM_0,
        "largest long side in pixels; 0: the weights' own, 1333 of DETR's",
        DETECTION,
    ),
    _field(
        "data.buckets",
        5,
        COUNT,
        "number of canvases that images are padded to; each that occurs is compiled once",
        DETECTION,
    ),
    _field(
        "data.crop_pct",
        0.0,
        SHARE,
        "evaluation view: side of the center crop, as a share; 0 takes the weights' own",
        CLASSIFICATION,
        *UNLABELLED,
        IMAGE_TEXT,
    ),
    _field(
        "data.view",
        "",
        Check(
            lambda value: value in ("", "original", "squash", "pad", "short", "windows"),
            "original, squash, pad, short, windows, or empty",
        ),
        "evaluation view: the image's own size, model.image_size squashed or padded, that of its "
        "short side alone, or so in windows; empty: the weights' own",
        SEGMENTATION,
    ),
    _field("data.interpolation", "", FILTER, "filter of resizing; empty: the weights' own"),
    _field(
        "data.max_boxes",
        100,
        COUNT,
        "boxes of an image, at most the model's queries; the largest are kept",
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
        "training view: the crop; pad shifts by up to 1/8 of the size",
        CLASSIFICATION,
        *UNLABELLED,
        IMAGE_TEXT,
        self_distillation="none",
        contrastive="none",
        image_text="none",
    ),
    _field(
        "data.crop_scale",
        (0.08, 1.0),
        AREAS,
        "smallest and largest area of a random_resized crop, as shares of the image",
        CLASSIFICATION,
        *UNLABELLED,
        IMAGE_TEXT,
        pretraining=(0.2, 1.0),
    ),
    _field(
        "data.crop",
        0.5,
        SHARE,
        "training view: share of the images that are cropped at random",
        DETECTION,
    ),
    _field(
        "data.mosaic",
        0.0,
        SHARE,
        "training view: share of the images that become mosaics of four; for square images",
        DETECTION,
    ),
    _field(
        "data.mosaic_scale",
        (0.5, 1.5),
        FACTORS,
        "training view: smallest and largest factor that a mosaic is scaled by",
        DETECTION,
    ),
    _field(
        "data.mixup",
        0.0,
        SHARE,
        "training view: share of the mosaics that are mixed with another image",
        DETECTION,
    ),
    _field(
        "data.plain_steps",
        0,
        FROM_0,
        "updates at the end without mosaics; YOLOX adds an L1 loss of its boxes in them",
        DETECTION,
    ),
    _field(
        "data.scale",
        (0.5, 2.0),
        FACTORS,
        "training view: smallest and largest factor that the crop's image is scaled by",
        SEGMENTATION,
    ),
    _field(
        "data.turn",
        False,
        ANY,
        "training view: turn by 0, 90, 180 or 270 degrees, where up is no direction",
        SEGMENTATION,
    ),
    _field(
        "data.flip",
        True,
        ANY,
        "training view: flip half of the images horizontally",
        self_distillation=False,
        contrastive=False,
        image_text=False,
    ),
    _field(
        "data.brightness",
        0.0,
        NOT_NEGATIVE,
        "training view: brightness is multiplied by a factor in 1 ± this",
        DETECTION,
        SEGMENTATION,
    ),
    _field(
        "data.contrast",
        0.0,
        NOT_NEGATIVE,
        "training view: contrast is multiplied by a factor in 1 ± this",
        DETECTION,
        SEGMENTATION,
    ),
    _field(
        "data.saturation",
        0.0,
        NOT_NEGATIVE,
        "training view: saturation is multiplied by a factor in 1 ± this",
        DETECTION,
        SEGMENTATION,
    ),
    _field("data.threads", 2, COUNT, "threads that decode images, in each worker"),
    _field("data.workers", 0, FROM_0, "worker processes that decode images; 0 uses threads alone"),
    _field("data.max_damaged", 0.01, SHARE, "stop when a larger share of the images can't be read"),
    # Augmentation, on the device.
    _field(
        "augment.policy",
        "none",
        one_of("none", "rand", "trivial"),
        "RandAugment (rand), TrivialAugment (trivial), on the device",
        CLASSIFICATION,
    ),
    _field("augment.ops", 2, FROM_0, "operations of rand on each image", CLASSIFICATION),
    _field(
        "augment.magnitude",
        9,
        Check(lambda value: 0 <= value <= 30, "between 0 and 30"),
        "magnitude of rand's operations",
        CLASSIFICATION,
    ),
    _field("augment.mixup", 0.0, NOT_NEGATIVE, "alpha of mixup; 0 turns it off", CLASSIFICATION),
    _field("augment.cutmix", 0.0, NOT_NEGATIVE, "alpha of CutMix; 0 turns it off", CLASSIFICATION),
    _field("augment.erasing", 0.0, SHARE, "probability of random erasing", CLASSIFICATION),
    _field(
        "augment.label_smoothing",
        0.1,
        SHARE,
        "share of the target that is spread evenly over all classes",
        CLASSIFICATION,
    ),
    # A detector's loss: of pairs of query and box, to match them, then to train.
    _field(
        "loss.class_cost", 1.0, NOT_NEGATIVE, "weight of the class term in the matching", DETECTION
    ),
    _field(
        "loss.l1_cost",
        5.0,
        NOT_NEGATIVE,
        "weight of the L1 distance of boxes in the matching",
        DETECTION,
    ),
    _field(
        "loss.giou_cost",
        2.0,
        NOT_NEGATIVE,
        "weight of the generalized IoU in the matching",
        DETECTION,
    ),
    _field(
        "loss.class_weight",
        1.0,
        NOT_NEGATIVE,
        "weight of the class term in the loss, and in the matching of masks",
        DETECTION,
        SEGMENTATION,
        segmentation=2.0,
    ),
    _field(
        "loss.l1_weight",
        5.0,
        NOT_NEGATIVE,
        "weight of the L1 distance of boxes in the loss",
        DETECTION,
    ),
    _field(
        "loss.giou_weight",
        2.0,
        NOT_NEGATIVE,
        "weight of the generalized IoU in the loss",
        DETECTION,
    ),
    _field(
        "loss.no_object_weight",
        0.1,
        NOT_NEGATIVE,
        "weight of queries without a target in DETR's and EoMT's class term; RF-DETR's has none",
        DETECTION,
        SEGMENTATION,
    ),
    # A segmenter's loss, a mean over all pixels of an update that have a class.
    _field(
        "loss.pixel_weight",
        1.0,
        NOT_NEGATIVE,
        "weight of the cross-entropy of pixels, or of their focal loss",
        SEGMENTATION,
    ),
    _field("loss.dice_weight", 0.0, NOT_NEGATIVE, "weight of Dice in the loss", SEGMENTATION),
    _field(
        "loss.focal_gamma",
        0.0,
        NOT_NEGATIVE,
        "gamma of the focal loss of pixels; 0 is cross-entropy",
        SEGMENTATION,
    ),
    _field(
        "loss.class_weights",
        (),
        Check(_every(lambda value: _is_number(value) and value >= 0), "numbers of at least 0"),
        "weights of the classes in the loss of images or pixels, by label; () for equal ones",
        CLASSIFICATION,
        SEGMENTATION,
    ),
    _field(
        "loss.balance",
        "none",
        one_of("none", "frequency"),
        "weigh classes by how rare they are in an update's labels (frequency)",
        SEGMENTATION,
    ),
    _field(
        "loss.auxiliary_weight",
        0.4,
        NOT_NEGATIVE,
        "weight of the loss of an auxiliary head, where the model has one",
        SEGMENTATION,
    ),
    # Of models that find a set of masks, in the matching and in the loss.
    _field(
        "loss.mask_weight",
        5.0,
        NOT_NEGATIVE,
        "weight of the cross-entropy of a query's mask (EoMT)",
        SEGMENTATION,
    ),
    _field(
        "loss.mask_dice_weight",
        5.0,
        NOT_NEGATIVE,
        "weight of Dice of a query's mask (EoMT)",
        SEGMENTATION,
    ),
    _field(
        "loss.points",
        12_544,
        COUNT,
        "points at which a query's mask is compared (EoMT)",
        SEGMENTATION,
    ),
    # A masked autoencoder's.
    _field(
        "mae.mask_ratio",
        0.75,
        Check(lambda value: 0 < value < 1, "above 0 and below 1"),
        "share of the patches that the encoder does not see and that are reconstructed",
        PRETRAINING,
    ),
    _field(
        "mae.normalize",
        True,
        ANY,
        "reconstruct each patch's pixels less their mean, over their standard deviation",
        PRETRAINING,
    ),
    # Self-distillation's: DINO, with iBOT's and DINOv2's terms as switches.
    _field(
        "dino.view_size",
        0,
        FROM_0,
        "pixels a side of the square that views are cropped from; 0 takes model.image_size",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.global_scale",
        (0.25, 1.0),
        AREAS,
        "smallest and largest area of the two global crops, as shares of the square",
        SELF_DISTILLATION,
    ),
    _field("dino.local_crops", 8, FROM_0, "local crops of each image", SELF_DISTILLATION),
    _field(
        "dino.local_size",
        96,
        COUNT,
        "pixels a side of a local crop, a multiple of the patch",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.local_scale",
        (0.05, 0.25),
        AREAS,
        "smallest and largest area of the local crops, as shares of the square",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.jitter",
        1.0,
        SHARE,
        "strength of changed colors in the views, 1 the paper's; 0 changes none",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.blur",
        (0.1, 2.0),
        SIGMAS,
        "smallest and largest standard deviation of the views' blur in pixels; () blurs none",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.solarize", 0.2, SHARE, "share of second global crops solarized", SELF_DISTILLATION
    ),
    _field(
        "dino.student_temperature",
        0.1,
        ABOVE_0,
        "temperature of the student's softmax",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.teacher_temperature",
        (0.04, 0.04),
        FACTORS,
        "temperatures of the teacher's softmax, before and after its warm-up",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.temperature_steps",
        0,
        FROM_0,
        "updates over which the teacher's temperature rises",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.final_momentum",
        1.0,
        SHARE,
        "of the teacher, which begins with optim.ema_decay, at the end of half a cosine",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.centering",
        "center",
        one_of("center", "sinkhorn"),
        "what keeps the teacher from one choice: a moving center, or Sinkhorn-Knopp (DINOv2)",
        SELF_DISTILLATION,
    ),
    _field("dino.center_momentum", 0.9, SHARE, "of the moving center", SELF_DISTILLATION),
    _field(
        "dino.frozen_steps",
        0,
        FROM_0,
        "first updates in which the prototypes, a head's last layer, do not train",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.patch_weight",
        0.0,
        NOT_NEGATIVE,
        "weight of the loss of masked patches (iBOT); 0 masks none",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.masked_images",
        0.5,
        SHARE,
        "share of the student's global crops that are masked",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.mask_ratio",
        (0.1, 0.5),
        AREAS,
        "smallest and largest share of a masked crop's patches that are hidden",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.koleo_weight",
        0.0,
        NOT_NEGATIVE,
        "weight of the spread of features in a batch (KoLeo, DINOv2: 0.1); 0 leaves it out",
        SELF_DISTILLATION,
    ),
    _field(
        "dino.stop",
        False,
        ANY,
        "end a run that has collapsed, instead of a warning",
        SELF_DISTILLATION,
    ),
    # Contrastive learning's: SimCLR.
    _field(
        "contrastive.view_size",
        0,
        FROM_0,
        "pixels a side of the square that views are cropped from; 0 takes model.image_size",
        CONTRASTIVE,
    ),
    _field(
        "contrastive.scale",
        (0.08, 1.0),
        AREAS,
        "smallest and largest area of a view, as shares of the square",
        CONTRASTIVE,
    ),
    _field(
        "contrastive.jitter",
        1.0,
        SHARE,
        "strength of changed colors in the views, 1 the paper's; 0 changes none",
        CONTRASTIVE,
    ),
    _field(
        "contrastive.blur",
        (0.1, 2.0),
        SIGMAS,
        "smallest and largest standard deviation of the views' blur in pixels; () blurs none",
        CONTRASTIVE,
    ),
    _field("contrastive.blurred", 0.5, SHARE, "share of the views that are blurred", CONTRASTIVE),
    _field(
        "contrastive.temperature",
        0.5,
        ABOVE_0,
        "temperature of the loss; the lower, the more the nearest others count",
        CONTRASTIVE,
    ),
    _field(
        "contrastive.stop",
        False,
        ANY,
        "end a run that has collapsed, instead of a warning",
        CONTRASTIVE,
    ),
    # What the frozen features of these are worth, by labels.
    _field(
        "probe.data",
        "",
        ANY,
        "labelled images that evaluation's probes learn from; data.eval's test them; empty: none",
        *UNLABELLED,
    ),
    _field(
        "probe.subset",
        0,
        FROM_0,
        "number of these images, the classes in equal parts; 0 takes all",
        *UNLABELLED,
    ),
    _field(
        "probe.neighbors",
        20,
        FROM_0,
        "k of the nearest neighbors, eval/knn; 0 asks none",
        *UNLABELLED,
    ),
    _field(
        "probe.strength",
        1.0,
        NOT_NEGATIVE,
        "C of the linear probe's logistic regression, eval/linear; 0 fits none",
        *UNLABELLED,
    ),
    _field(
        "probe.shots",
        10,
        FROM_0,
        "labels of each class in a regression on few, eval/few_shot; 0 fits none",
        *UNLABELLED,
    ),
    _field("probe.repeats", 5, COUNT, "random choices of these few labels", *UNLABELLED),
    # Images and texts.
    _field(
        "text.path_column",
        "",
        ANY,
        "of a .csv or .jsonl: the column of images' paths; empty: path, file_name and the like",
        IMAGE_TEXT,
    ),
    _field(
        "text.caption_column",
        "caption",
        ANY,
        "of lists and .parquet: the column; empty: captions made of labels and text.templates",
        IMAGE_TEXT,
    ),
    _field(
        "text.templates",
        ("a photo of a {}.",),
        TEMPLATES,
        "what is said of a class, {} being its name: captions of labels, prompts of zero-shot",
        IMAGE_TEXT,
    ),
    _field(
        "text.tokenizer",
        "",
        ANY,
        "a tokenizer.json, or a folder that has one; empty: trained on the captions",
        IMAGE_TEXT,
    ),
    _field(
        "text.vocab_size",
        32_000,
        COUNT,
        "different tokens at most, where a tokenizer is trained",
        IMAGE_TEXT,
    ),
    _field("text.length", 64, COUNT, "tokens of a text, padding among them", IMAGE_TEXT),
    _field(
        "text.zero_shot",
        "",
        ANY,
        "evaluation: images with labels, as data.train of classification; empty: none",
        IMAGE_TEXT,
    ),
    _field(
        "text.classes",
        (),
        WORDS,
        "what to call the classes of text.zero_shot, by label; () for their own names",
        IMAGE_TEXT,
    ),
    _field(
        "text.stop",
        False,
        ANY,
        "end a run that has collapsed, instead of a warning",
        IMAGE_TEXT,
    ),
    # Evaluation.
    _field(
        "evaluate.every",
        100,
        FROM_0,
        "updates between evaluations, 0 for once an epoch; the end of training always evaluates",
        detection=0,
    ),
    _field(
        "evaluate.stop_after",
        0,
        FROM_0,
        "evaluations in a row without a better figure that end training early; 0 for never",
    ),
    _field(
        "evaluate.batch_size",
        100,
        COUNT,
        "images of a batch in evaluation",
        detection=8,
        segmentation=8,
    ),
    _field(
        "evaluate.score",
        0.5,
        SHARE,
        "boxes and instances of a lower score are not drawn, panoptic segments not made",
        DETECTION,
        SEGMENTATION,
        segmentation=0.8,
    ),
    _field(
        "evaluate.overlap",
        0.8,
        SHARE,
        "share of its mask that a panoptic segment keeps at least where others are surer",
        SEGMENTATION,
    ),
    _field(
        "evaluate.window",
        0,
        FROM_0,
        "pixels a side of the windows that images are segmented by; 0 takes whole images",
        SEGMENTATION,
    ),
    _field(
        "evaluate.stride",
        0,
        FROM_0,
        "pixels between windows, whose scores are averaged; 0 takes two thirds of a window",
        SEGMENTATION,
    ),
    _field(
        "evaluate.background",
        "",
        ANY,
        "name of the class that is no foreground, for foreground_iou; empty: none is",
        SEGMENTATION,
    ),
    _field(
        "evaluate.objects",
        "",
        ANY,
        "name of the class whose connected parts are counted; empty: none are",
        SEGMENTATION,
    ),
    _field(
        "evaluate.least_pixels",
        1,
        COUNT,
        "pixels that such a part has at least",
        SEGMENTATION,
    ),
    _field("evaluate.boundaries", True, ANY, "measure boundary IoU", SEGMENTATION),
    _field(
        "evaluate.warn_after",
        500,
        FROM_0,
        "updates after which empty or constant predictions are warned of",
        DETECTION,
        SEGMENTATION,
        *UNLABELLED,
        IMAGE_TEXT,
        pretraining=200,
        self_distillation=100,
        contrastive=100,
        image_text=100,
    ),
    _field(
        "evaluate.neighbors",
        (1, 20),
        COUNTS,
        "probe: the k of k-nearest neighbors",
        CLASSIFICATION,
    ),
    _field(
        "evaluate.shots",
        (1, 5, 10),
        COUNTS,
        "probe: training images of each class in few-shot classification",
        CLASSIFICATION,
    ),
    _field("evaluate.repeats", 5, COUNT, "probe: random choices of those images", CLASSIFICATION),
    # robustness, on a finished run.
    _field(
        "robustness.images",
        1_000,
        FROM_0,
        "number of images, evenly spread over the evaluation data; 0 takes all",
        detection=500,
        segmentation=100,
    ),
    _field(
        "robustness.batch_size",
        100,
        COUNT,
        "images of a batch in robustness",
        detection=8,
        segmentation=8,
    ),
    _field(
        "robustness.norm",
        "linf",
        one_of("linf", "l2", "l1"),
        "norm that bounds a perturbation",
    ),
    _field(
        "robustness.epsilons",
        (1 / 255, 2 / 255, 4 / 255, 8 / 255),
        EPSILONS,
        "largest norms of perturbations, one row each; images are in [0, 1]",
    ),
    _field(
        "robustness.attacks",
        ("fgsm", "pgd"),
        WORDS,
        "fgsm, pgd, mifgsm, difgsm, apgd-ce, apgd-dlr; detectors and segmenters have the first two",
    ),
    _field(
        "robustness.steps",
        20,
        COUNT,
        "steps of each attack but fgsm",
        detection=10,
        segmentation=10,
    ),
    _field("robustness.restarts", 1, COUNT, "random restarts of each attack but fgsm"),
    _field(
        "robustness.autoattack",
        "off",
        one_of("off", "standard", "plus", "rand"),
        "version of AutoAttack; it takes about 100 times PGD-20's time",
        CLASSIFICATION,
    ),
    _field(
        "robustness.autoattack_epsilon",
        8 / 255,
        ABOVE_0,
        "largest norm of AutoAttack's perturbations; images are in [0, 1]",
        CLASSIFICATION,
    ),
    _field(
        "robustness.corruptions",
        ("all",),
        WORDS,
        "corruptions: all, some of the 15 (docs/robustness.md), or ()",
        CLASSIFICATION,
    ),
    _field(
        "robustness.severities",
        (1, 2, 3, 4, 5),
        SEVERITIES,
        "severities of each corruption",
        CLASSIFICATION,
    ),
    _field(
        "robustness.self_check",
        True,
        ANY,
        "look for signs of gradient masking, at the largest epsilon",
        CLASSIFICATION,
    ),
    _field(
        "robustness.transfer_from",
        "",
        ANY,
        "workdir of another run, whose adversarial examples are tried on this one",
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
