"""The architectures by name: the one list of what there is to build."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import jax
import jax.numpy as jnp

from vision_jax import limits
from vision_jax.errors import UserError, nearest
from vision_jax.models import (
    autoencoder_kl,
    autoencoder_tiny,
    beit,
    convnext,
    deeplab,
    detr,
    dino,
    dit,
    efficientnet,
    eomt,
    faster_rcnn,
    fcos,
    inception,
    mae,
    mit,
    nanodet,
    pyramid,
    regnet,
    resnet,
    retinanet,
    rf_detr,
    segformer,
    siglip,
    simclr,
    swin,
    unet,
    upernet,
    vit,
    yolox,
)
from vision_jax.models.attention import attention_weights
from vision_jax.models.layers import KERNEL_INPUT
from vision_jax.models.layers import RUN_ARGUMENTS as RUN_ARGUMENTS
from vision_jax.trees import paths

GENERATION = "generation"  # what models are for that make images


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
      model: its flax module. It takes `num_classes`, `in_channels`, `mean`, `std` and `dtype`, has
        the attribute `stem` (path of the first convolution's kernel), the method
        `layer_of(path)` with the property `num_layers` for layer-wise rate decay, and the property
        `pyramid`: ((named feature, stride in pixels), ...) from fine to coarse, () without one.
      variant: arguments of a named variant, or None if the name is not one of this family's.
      task: what its head is for.
      predicts: what it finds: the classes of whole images, or of each pixel; a set of boxes whose
        classes are a softmax with one for no object, or a sigmoid each; boxes of proposals that it
        makes first; a box and classes of each anchor, of each point, which also says how central it
        is, or of each cell of its maps, whose box may be distributions of its sides (see
        tasks.detection.objective.PREDICTIONS); the pixels of patches; a likeness to prototypes;
        vectors that are compared with each other; which images and texts belong together;
        images, out of noise or of latents.
        Of pixels they are logits f[B, h, w, K] at the model's own stride, or a set of masks, each
        with a class.
      pixel_mask: whether it takes padded images, f32[B, H, W, C], and beside them which pixels are
        some, bool[B, H, W].
      backbone: where the parameters of a model inside it begin, "backbone/"; "" without one.
      preprocessing: how its images are prepared where its weights do not say: fields of the task's
        preprocessing; {} is the task's own way.
      wraps: the family whose models are a part of it under the same names, and whose variants and
        weights its task takes for its own; "" without one.
    """

    model: Callable[..., Any]
    variant: Callable[[str], dict[str, Any] | None]
    task: str = "classification"
    predicts: Literal[
        "classes",
        "softmax_set",
        "sigmoid_set",
        "proposals",
        "anchors",
        "points",
        "cells",
        "sides",
        "semantic",
        "pixels",
        "prototypes",
        "projections",
        "pairs",
        "mask_set",
        "images",
    ] = "classes"
    pixel_mask: bool = False
    backbone: str = ""
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    wraps: str = ""

    @property
    def arguments(self) -> list[str]:
        """Names of the model's arguments."""
        return [f.name for f in fields(self.model) if f.name not in ("parent", "name")]  # type: ignore[arg-type]

    @property
    def required(self) -> list[str]:
        """The arguments that have no default."""
        return [name for name in self.arguments if name not in self.defaults]

    @property
    def defaults(self) -> dict[str, Any]:
        """The arguments that have a default, with it."""
        known = [f for f in fields(self.model) if f.default is not MISSING]  # type: ignore[arg-type]
        return {f.name: f.default for f in known if f.name not in ("parent", "name")}


FAMILIES: dict[str, Family] = {
    "autoencoder_kl": Family(
        autoencoder_kl.AutoencoderKl, autoencoder_kl.variant, GENERATION, "images"
    ),
    "autoencoder_tiny": Family(
        autoencoder_tiny.AutoencoderTiny, autoencoder_tiny.variant, GENERATION, "images"
    ),
    "vit": Family(vit.ViT, vit.variant),
    "beit": Family(beit.Beit, beit.variant),
    "convnext": Family(convnext.ConvNeXt, convnext.variant),
    "deeplab": Family(
        deeplab.DeepLabV3, deeplab.variant, "segmentation", "semantic", backbone="backbone/"
    ),
    "detr": Family(detr.Detr, detr.variant, "detection", "softmax_set", True, "backbone/"),
    "dino": Family(dino.Dino, dino.variant, "self_distillation", "prototypes", wraps="vit"),
    "dit": Family(dit.Dit, dit.variant, GENERATION, "images"),
    "efficientnet": Family(efficientnet.EfficientNet, efficientnet.variant),
    "eomt": Family(
        eomt.Eomt,
        eomt.variant,
        "segmentation",
        "mask_set",
        preprocessing=eomt.PREPROCESSING,
        wraps="vit",
    ),
    "faster_rcnn": Family(
        faster_rcnn.FasterRcnn,
        faster_rcnn.variant,
        "detection",
        "proposals",
        True,
        "backbone/",
        pyramid.PREPROCESSING,
    ),
    "fcos": Family(
        fcos.Fcos,
        fcos.variant,
        "detection",
        "points",
        True,
        "backbone/",
        pyramid.PREPROCESSING,
    ),
    "inception": Family(
        inception.Inception,
        inception.variant,
        preprocessing={"image_size": (299, 299), "interpolation": "bilinear"},
    ),
    "mae": Family(mae.Mae, mae.variant, "pretraining", "pixels", wraps="vit"),
    "mit": Family(mit.MixTransformer, mit.variant),
    "nanodet": Family(
        nanodet.NanoDet,
        nanodet.variant,
        "detection",
        "sides",
        True,
        preprocessing=nanodet.PREPROCESSING,
    ),
    "regnet": Family(regnet.RegNet, regnet.variant),
    "resnet": Family(resnet.ResNet, resnet.variant),
    "retinanet": Family(
        retinanet.RetinaNet,
        retinanet.variant,
        "detection",
        "anchors",
        True,
        "backbone/",
        pyramid.PREPROCESSING,
    ),
    "rf_detr": Family(
        rf_detr.RfDetr, rf_detr.variant, "detection", "sigmoid_set", True, "backbone/"
    ),
    "segformer": Family(
        segformer.SegFormer,
        segformer.variant,
        "segmentation",
        "semantic",
        backbone="backbone/",
    ),
    "simclr": Family(simclr.SimClr, simclr.variant, "contrastive", "projections", wraps="vit"),
    "siglip": Family(siglip.Siglip, siglip.variant, "image_text", "pairs", wraps="vit"),
    "swin": Family(swin.Swin, swin.variant),
    "unet": Family(unet.UNet, unet.variant, "segmentation", "semantic", backbone="backbone/"),
    "upernet": Family(
        upernet.UPerNet, upernet.variant, "segmentation", "semantic", backbone="backbone/"
    ),
    "yolox": Family(
        yolox.Yolox, yolox.variant, "detection", "cells", True, "backbone/", yolox.PREPROCESSING
    ),
}


def find_variant(name: str) -> tuple[str, dict[str, Any]]:
    """(family, arguments) of a named variant, such as "resnet50" or "b/16".

    A family's own name ("vit") has no arguments: the caller gives them all.

    Raises:
      UserError: no family has it.
    """
    if name in FAMILIES:
        return name, {}
    for family, description in FAMILIES.items():
        arguments = description.variant(name)
        if arguments is not None:
            return family, arguments
    raise UserError(
        f"unknown variant {name!r}: take a name such as b/16, resnet50, convnext_tiny or one of "
        "docs/zoo.md"
    )


def for_task(task: str, family: str, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """(family, arguments) that a task makes of a model: of a ViT, pretraining makes an MAE's."""
    for name, known in FAMILIES.items():
        if known.task == task and known.wraps == family:
            left_out = getattr(known.model, "left_out", ())
            return name, vit.encoder_arguments(arguments, left_out)
    return family, dict(arguments)


def takes_backbone(family: str, of: str) -> bool:
    """Whether a classifier of the family `of` can be the backbone of a model of another one."""
    return bool(FAMILIES[family].backbone) and FAMILIES[of].task == "classification"


def family_of(model: Any) -> str:
    """The name of a built model's family."""
    return next(name for name, family in FAMILIES.items() if type(model) is family.model)


def build_model(family: str, **arguments: Any) -> Any:
    """Builds a model of a family from its arguments.

    Raises:
      UserError: see `check_arguments`; or one that has no default is missing.
    """
    check_arguments(family, arguments)
    try:
        return FAMILIES[family].model(**arguments)
    except TypeError as error:  # "missing 1 required positional argument"
        raise UserError(f"{family}: {error}") from error


def check_arguments(family: str, arguments: Mapping[str, Any]) -> None:
    """Checks arguments of a model before anything is made by them; some may be left out.

    Raises:
      UserError: no such family or argument, a value of another type, or beyond its bound.
    """
    if not isinstance(family, str) or family not in FAMILIES:
        raise UserError(f"unknown family {str(family)!r}{nearest(str(family), list(FAMILIES))}")
    known = FAMILIES[family]
    kinds = {f.name: f.type for f in fields(known.model)}  # type: ignore[arg-type]
    for name, value in arguments.items():
        if name not in known.arguments:
            raise UserError(f"{family} has no argument `{name}`{nearest(name, known.arguments)}")
        try:
            limits.check_argument(name, value, kinds[name])
        except ValueError as error:
            raise UserError(f"{family}: {name} {value!r} {error}") from None


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}  # a config's names


def initialize(model: Any, key: jax.Array, image_size: tuple[int, int]) -> Any:
    """{"params": ..., "batch_stats": ...} of a model; the latter only if it has BatchNorm."""
    try:
        init = _init_of(model, tuple(image_size))
    except TypeError:  # somebody's model with an argument that has no hash
        init = _init_of.__wrapped__(model, tuple(image_size))
    return init(key)


@functools.lru_cache(maxsize=8)
def _init_of(model: Any, image_size: tuple[int, ...]) -> Callable[[jax.Array], Any]:
    """`model.init` that is traced once, however many ask for its shapes or for some of its arrays.

    Tracing a model takes seconds, most of a start with compiled programs in the cache. `inline`
    leaves no call in the program of those who ask: it is the one that they would have traced.
    """

    def init(key: jax.Array) -> Any:
        return model.init(key, jnp.zeros((1, *image_size, model.in_channels)))

    return jax.jit(init, inline=True)


def check_image_size(model: Any, image_size: tuple[int, int], where: str) -> None:
    """Checks a size that somebody asks for; weights keep the one that they come with.

    The sources' models cut an image that does not fill its patches, without a word: timm's,
    transformers' (but for its Swin, which pads) and torchvision's ConvNeXt and Swin; its ViT
    refuses.

    Args:
      model: of any family.
      image_size: (height, width) in pixels.
      where: it was given, for the message.

    Raises:
      UserError: the model would not see all of the pixels.
    """
    unit = getattr(model, "size_divisor", 1)
    for side in image_size:
        if more := side % unit:
            near = [str(one) for one in (side - more, side - more + unit) if one]
            raise UserError(
                f"{where}: of {side} pixels a {family_of(model)} with patches of {unit} would not "
                f"see the last {more}: take a multiple of {unit}, such as {' or '.join(near)}"
            )


def make_apply(
    model: Any, features: Sequence[str] = ()
) -> Callable[..., tuple[dict[str, Any], Any]]:
    """The model as tasks call it (see objective.Apply).

    Outputs are a dict: a classifier's has "logits". With `features` it also has "features", those
    of the names given (see `apply_with_features`).
    """

    def apply(params, model_state, *inputs, train, keys):
        variables = {"params": params}
        if model_state:
            variables["batch_stats"] = model_state
        arguments: dict[str, Any] = {"train": train, "rngs": keys}
        if train and model_state:
            arguments["mutable"] = ["batch_stats"]
        if features:
            result = apply_with_features(model, variables, *inputs, names=features, **arguments)
        else:
            result = model.apply(variables, *inputs, **arguments)
        result, changed = result if "mutable" in arguments else (result, {})
        outputs, found = result if features else (result, {})
        outputs = as_outputs(outputs)
        if features:
            outputs = {**outputs, "features": found}
        return dict(outputs), changed.get("batch_stats", model_state)

    return apply


def as_outputs(outputs: Any) -> Mapping[str, Any]:
    """A model's outputs as a dict: a classifier gives its logits alone."""
    return outputs if isinstance(outputs, Mapping) else {"logits": outputs}


def unrolled(model: Any) -> Any:
    """The model without loops over its blocks, and without recomputation: the same numbers."""
    known = {field.name for field in fields(model)}
    return model.clone(**{name: False for name in ("scan", "remat") if name in known})


def apply_with_inputs(
    model: Any, variables: Mapping[str, Any], *inputs: Any
) -> tuple[Any, dict[str, list[jax.Array]]]:
    """`model.apply`, and what each kernel multiplies, by its path: several of a layer used twice.

    Not in a loop over blocks (`scan`), nor recomputed (`remat`).
    """
    outputs, changed = model.apply(variables, *inputs, mutable=["intermediates"])
    found: dict[str, list[jax.Array]] = {}
    for path, x in paths.flatten(changed.get("intermediates", {})).items():
        layer, _, name = path.rpartition("/")[0].rpartition("/")
        if name == KERNEL_INPUT:
            found.setdefault(f"{layer}/kernel", []).append(x)
    return outputs, found


ATTENTION = "/attention"  # block_0/attention: f[B, K, N, N]


def apply_with_features(
    model: Any,
    variables: Mapping[str, Any],
    *inputs: Any,
    names: Sequence[str],
    mutable: Sequence[str] = (),
    **arguments: Any,
) -> Any:
    """`model.apply` that also returns named intermediates: (outputs, {name: f[B, ...]}).

    The outputs are what they are without, and under `jit` only what is named is computed. The names
    are those of the model's `return_features`, and in a ViT the attention probabilities of a block,
    "block_0/attention" f[B, K, N, N], which are computed anew from its queries and keys, beside the
    fused attention.

    Args:
      model: of any family.
      variables: its collections, "params" and perhaps "batch_stats".
      *inputs: images, and a detector's pixel mask.
      names: which intermediates.
      mutable: collections that change, as of flax's `apply`; if there are any, the result is
        ((outputs, features), changed collections).
      **arguments: of `model.apply`: train, rngs.

    Raises:
      UserError: a name that the model has not, with the nearest that it has.
    """
    sown = [name for name in names if name.endswith(ATTENTION)]
    collections = [*mutable, *(["intermediates"] if sown else [])]
    result = model.apply(
        variables, *inputs, return_features=True, mutable=collections or False, **arguments
    )
    (outputs, features), changed = result if collections else (result, {})
    kept = {name: tree for name, tree in changed.items() if name in mutable}
    for block, given in _queries_and_keys(changed):
        if block + ATTENTION in sown:
            features[block + ATTENTION] = attention_weights(*given)
    for name in names:
        if name not in features:
            known = feature_names(model, variables, *inputs)
            scanned = name in sown and getattr(model, "scan", False)
            hint = "; set model.scan=False" if scanned else nearest(name, known)
            raise UserError(
                f"features: {family_of(model)} gives no {name!r} of {', '.join(known)}{hint}"
            )
    chosen = {name: features[name] for name in names}
    return ((outputs, chosen), kept) if mutable else (outputs, chosen)


def feature_names(model: Any, variables: Mapping[str, Any], *inputs: Any) -> tuple[str, ...]:
    """What `apply_with_features` can give, in the order of computation; nothing is computed.

    Args:
      model: of any family.
      variables: its collections, or their ShapeDtypeStructs.
      *inputs: images, and a detector's pixel mask, or their ShapeDtypeStructs.
    """
    names: list[str] = []

    def run(variables, inputs):
        (_, features), changed = model.apply(
            variables, *inputs, return_features=True, mutable=["intermediates"]
        )
        blocks = {block for block, _ in _queries_and_keys(changed)}
        for name in features:
            names.extend([name + ATTENTION] if name in blocks else [])
            names.append(name)

    jax.eval_shape(run, variables, inputs)  # whose result would be sorted by name
    return tuple(names)


def _queries_and_keys(changed: Mapping[str, Any]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(block, its (queries, keys f[B, N, K, d], bias or None)) of a ViT's "intermediates"."""
    for block, tree in changed.get("intermediates", {}).items():
        if "query_key" in tree.get("attn", {}):
            yield block, tree["attn"]["query_key"][0]
