"""The Python face: a pretrained model as a frozen value with pure functions.

    load -> Loaded: preprocess, apply, features, pyramid, postprocess
    evaluate, save, export_adapter, import_adapter: of a Loaded and its variables, or trained ones

No function here has a state, and none needs a config or a workdir. Each is a few lines over what a
run is made of, so that a notebook and a run compute the same.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from vision_jax import convert, sharding
from vision_jax.config import default_config
from vision_jax.convert import peft
from vision_jax.convert.package import write_package
from vision_jax.convert.quantized import QuantizedFile, read_quantized
from vision_jax.convert.tables import published
from vision_jax.data.decode import image_to_array
from vision_jax.data.detection_transforms import (
    DetectionPreprocessing,
    choose_bucket,
    detection_eval_transform,
    resized_size,
)
from vision_jax.data.segmentation_transforms import (
    SegmentationPreprocessing,
    segmentation_eval_transform,
)
from vision_jax.data.sources import FileReader
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.models import families
from vision_jax.models.families import DTYPES, FAMILIES, Family
from vision_jax.objective import forward_keys
from vision_jax.ops.images import to_float
from vision_jax.run.description import find_head, model_shapes, own_image_size
from vision_jax.run.parameters import fill_parameters
from vision_jax.tasks.api import Evaluation, Trained, find_task
from vision_jax.tasks.detection.objective import PREDICTIONS, pixel_mask
from vision_jax.tasks.segmentation.objective import PREDICTIONS as SEGMENTERS
from vision_jax.tasks.segmentation.objective import unpad_scores
from vision_jax.trees import lora, paths
from vision_jax.trees.factored import factorize
from vision_jax.trees.quantize import is_quantized

Variables = Mapping[
    str, Any
]  # {"params": ..., "batch_stats": ...}, the latter with BatchNorm alone
Photo = str | os.PathLike[str] | Image.Image | np.ndarray

_ZOO_NAME = re.compile(r"(timm|torchvision|transformers)/[^/]+")


class Padded(NamedTuple):
    """A detector's images on one canvas, and what `Loaded.apply` and `postprocess` need beside.

    Attributes:
      images: f32[B, H, W, C] in [0, 1], padded at the bottom and at the right.
      pixel_mask: bool[B, H, W], where the images are.
      sizes: i32[B, 2], (height, width) of the original images in pixels.
    """

    images: np.ndarray
    pixel_mask: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: jit takes its methods
class Loaded:
    """A pretrained model. `dataclasses.replace` makes another one of it.

    Attributes:
      model: the flax module; `model.clone(drop_path=0.1)` is one that trains otherwise.
      variables: {"params": ...} and, with BatchNorm, {"batch_stats": ...}: nested dicts of arrays.
      class_names: by label; () without a head.
      preprocessing: how its images are prepared.
      origin: where the weights came from.
      new_paths: paths of the parameters that begin anew: a new head's.
      remarks: what whoever uses the weights should know: their license, what was assumed of them.
    """

    model: Any
    variables: Variables = field(repr=False)  # a notebook shows what a cell ends with
    class_names: tuple[str, ...]
    preprocessing: Preprocessing | DetectionPreprocessing | SegmentationPreprocessing
    origin: str
    new_paths: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """The entry of the model's architecture in families.FAMILIES."""
        return FAMILIES[families.family_of(self.model)]

    def preprocess(self, images: Photo | Sequence[Photo]) -> Any:
        """Images as the model was trained to see them, equal to the byte to its own library's.

        Of a segmenter's view "windows" the image is squashed into one; evaluation and
        the command `predict` take all windows.

        Args:
          images: one or several: paths of image files, PIL images, or uint8 arrays [H, W],
            [H, W, C] or [B, H, W, C].

        Returns:
          f32[B, h, w, C] in [0, 1]; mean and standard deviation are applied inside of the model.
          Of a detector `Padded`, whose first two fields `apply` takes.

        Raises:
          UserError: a file that cannot be read, or what is no image.
        """
        arrays = [_to_array(image) for image in _listed(images)]
        if not arrays:
            raise UserError("preprocess: no images given")
        own = self.preprocessing
        if isinstance(own, DetectionPreprocessing):
            return _pad(arrays, own)
        if isinstance(own, SegmentationPreprocessing):
            views = [segmentation_eval_transform(array, own) for array in arrays]
            if len({view.shape for view in views}) > 1:
                raise UserError(
                    "preprocess: images of different sizes, which this model takes as they are:"
                    " give those of one size together"
                )
            return np.stack(views).astype(np.float32) / 255
        return np.stack([eval_transform(array, own) for array in arrays]).astype(np.float32) / 255

    def apply(
        self,
        variables: Variables,
        images: Any,
        pixel_mask: Any = None,
        *,
        train: bool = False,
        key: jax.Array | None = None,
    ) -> dict[str, Any]:
        """The model's outputs for images; a pure function, for jit, grad and vmap.

        Args:
          variables: of the form of `self.variables`. Kernels may be structured leaves: adapters.
          images: f[B, H, W, C] in [0, 1], or u8[B, H, W, C].
          pixel_mask: bool[B, H, W], of a detector's padded images.
          train: dropout and drop path act, and BatchNorm takes the batch's statistics.
          key: of what is random in training.

        Returns:
          {"logits": f[B, C]}; without a head these are the pooled features f[B, D]. A detector's
          {"logits": f[L, B, Q, C], "boxes_cxcywh_01": f[L, B, Q, 4], ...} of its L decoder layers.
          In training of a model with BatchNorm also "batch_stats", the variables' next ones.
        """
        masks = () if pixel_mask is None else (pixel_mask,)
        state = variables.get("batch_stats", {})
        keys = {} if key is None else forward_keys(key)
        outputs, state = families.make_apply(self.model)(
            variables["params"], state, to_float(images), *masks, train=train, keys=keys
        )
        return {**outputs, "batch_stats": state} if train and state else outputs

    def features(
        self, variables: Variables, images: Any, names: Sequence[str], pixel_mask: Any = None
    ) -> dict[str, Any]:
        """Named intermediates; under jit only what they need is computed.

        Args:
          variables: see `apply`.
          images: f[B, H, W, C] in [0, 1], or u8[B, H, W, C].
          names: such as "stage_2", "block_5", "block_5/attention" and "pooled"; `feature_names` has
            all of them.
          pixel_mask: see `apply`.

        Returns:
          {name: f[B, ...]}: maps f[B, h, w, D], tokens f[B, N, D] or vectors f[B, D].

        Raises:
          UserError: a name that the model has not, with the nearest that it has.
        """
        masks = () if pixel_mask is None else (pixel_mask,)
        seen = to_float(images)
        return families.apply_with_features(self.model, variables, seen, *masks, names=names)[1]

    @property
    def feature_names(self) -> tuple[str, ...]:
        """What `features` can give, in the order of computation."""
        size = self.preprocessing.image_size
        images = jax.ShapeDtypeStruct((1, *size, self.model.in_channels), jnp.float32)
        return families.feature_names(self.model, self.variables, images)

    def pyramid(
        self, variables: Variables, images: Any, pixel_mask: Any = None
    ) -> dict[int, jax.Array]:
        """The feature maps of a backbone by stride, what dense tasks build upon.

        Args:
          variables: see `apply`.
          images: f[B, H, W, C] in [0, 1].
          pixel_mask: see `apply`.

        Returns:
          {stride in pixels: f[B, H / stride, W / stride, D]}, from fine to coarse.

        Raises:
          UserError: an architecture of one scale, such as a ViT: its `features` are tokens.
        """
        levels = self.model.pyramid
        if not levels:
            raise UserError(
                f"{self.origin}: a {families.family_of(self.model)} has one scale and no pyramid: "
                f"take features of {', '.join(self.feature_names)}"
            )
        found = self.features(variables, images, [name for name, _ in levels], pixel_mask)
        return {stride: found[name] for name, stride in levels}

    def postprocess(self, outputs: Mapping[str, Any], sizes: Any) -> dict[str, jax.Array]:
        """A detector's outputs as scored boxes, a segmenter's as masks; a pure function, too.

        Args:
          outputs: of `apply`.
          sizes: i32[B, 2], (height, width) of the original images in pixels.

        Returns:
          {"score": f[B, N], "label": i32[B, N], "boxes_xyxy_px": f[B, N, 4]}, in pixels of the
          original images; what scores 0 is no box. Of a segmenter, for images of one size,
          {"scores": f[B, H, W, K], "label": i32[B, H, W]}.

        Raises:
          UserError: neither of them, or masks of several sizes.
        """
        predicts = self.family.predicts
        if predicts in SEGMENTERS:
            wanted = np.unique(np.asarray(sizes).reshape(-1, 2), axis=0)
            if len(wanted) > 1:
                raise UserError("postprocess: masks of several sizes: take them size by size")
            scores_of = SEGMENTERS[predicts].scores
            if getattr(self.preprocessing, "view", "") == "pad":
                scores_of = unpad_scores(scores_of, self.preprocessing.image_size[0])
            scores = scores_of(outputs, tuple(wanted[0].tolist()))
            return {"scores": scores, "label": jnp.argmax(scores, axis=-1).astype(jnp.int32)}
        if predicts not in PREDICTIONS:
            raise UserError(f"{self.origin} is a classifier: take the softmax of its logits")
        return PREDICTIONS[predicts].postprocess(outputs, jnp.asarray(sizes))


def load(
    weights: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    dtype: Any = "float32",
    key: jax.Array | None = None,
    allow_pickle: bool = False,
) -> Loaded:
    """A model with its weights, from wherever they are.

    Each tensor has its place and each parameter its tensor, or an error says which have not.

    Args:
      weights: `embedded:vit_cifar10`, `hf://owner/name`, `timm://NAME[.TAG]`,
        `torchvision://NAME`, a name of docs/zoo.md (`timm/resnet50`), a file, a folder in Hugging
        Face's layout, the workdir of a finished run, its adapters merged, or the folder that
        `vision_jax quantize` wrote.
      num_classes: another number than the weights' begins a new head; 0 leaves the head out.
      class_names: names of the classes by label, instead of `num_classes`. A new head begins unless
        they are the weights' own.
      image_size: pixels a side, or (height, width); position embeddings are resampled for it.
      dtype: "float32" or "bfloat16", what the model computes in beside float32 parameters; or
        "float64", of parameters too, which needs JAX's `jax_enable_x64`.
      key: of a detector's new head; a classifier's begins at zero.
      allow_pickle: read .pth, .pt, .bin and .ckpt files too, with torch's weights-only reader.

    Returns:
      A frozen value; its arrays are on the default device.

    Raises:
      UserError: no such weights, no known architecture, or arguments that don't fit them.
    """
    spec = _spec(weights)
    if (quantized := read_quantized(spec)) is not None:
        others = (num_classes, class_names, image_size) != (None, None, None)
        if others and is_quantized(quantized.described):
            raise UserError(
                f"{quantized.origin} is quantized for its classes and size: load the float weights "
                "for others"
            )
        if not others:
            return _load_quantized(quantized, dtype)
    read = convert.read_weights(spec, allow_pickle=allow_pickle)
    family, arguments = convert.recognize(read)
    if FAMILIES[family].task == families.GENERATION and "predicts" not in arguments:
        raise UserError(
            f"{read.origin} is a {family}, which makes images: "
            "vision_jax.convert.load_model gives its model and arrays"
        )
    own_classes = arguments["num_classes"]
    own_names = _own_names(read, own_classes)
    names = _choose_names(own_names, num_classes, class_names)
    arguments["num_classes"] = len(names)
    preprocessing = _make_preprocessing(read, family, arguments, image_size)
    own_size = own_image_size(read, arguments)
    if "image_size" in FAMILIES[family].arguments:
        arguments["image_size"] = preprocessing.image_size
    model = families.build_model(family, **arguments, dtype=_compute_dtype(dtype))

    size = preprocessing.image_size
    if size != own_size:
        families.check_image_size(model, size, "image_size")
    shapes = model_shapes(model, size)
    target = {path: leaf for tree in shapes.values() for path, leaf in paths.flatten(tree).items()}
    begins = len(names) != own_classes or (class_names is not None and names != own_names)
    head = find_head(model, size)[0] if begins else set()
    imported = convert.import_weights(
        read,
        target,
        convert.arguments_of(model),
        reinitialized=sorted(head),
        place=lambda path, array: jnp.asarray(array),
    )
    new = sorted(head & target.keys())
    params, statistics = fill_parameters(
        model, size, shapes, imported, new, jax.random.key(0) if key is None else key
    )
    params = factorize(params, convert.ranks_of(read))
    variables = {"params": params, **({"batch_stats": statistics} if statistics else {})}
    if model.dtype == jnp.float64:
        variables = jax.tree.map(_widen, variables)
    remarks = tuple(convert.remarks(read))
    return Loaded(model, variables, names, preprocessing, read.origin, tuple(new), remarks)


def _load_quantized(held: QuantizedFile, dtype: Any) -> Loaded:
    model = families.build_model(held.family, **held.arguments, dtype=_compute_dtype(dtype))
    task = find_task(FAMILIES[held.family].task)
    try:
        preprocessing = task.load_preprocessing(held.preprocessing)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{held.origin}: its preprocessing is damaged ({error})") from None
    variables = held.variables(model_shapes(model, preprocessing.image_size))
    variables = jax.tree.map(jnp.asarray, variables)
    return Loaded(model, variables, held.class_names, preprocessing, held.origin)


def trained_of(loaded: Loaded, mesh: Mesh) -> Trained:
    """The model with its own arrays, on the mesh, as tasks use it."""
    placed = jax.device_put(dict(loaded.variables), sharding.replicated(mesh))
    return Trained(
        mesh=mesh,
        model=loaded.model,
        predicts=loaded.family.predicts,
        apply=families.make_apply(loaded.model),
        exact_apply=families.make_apply(loaded.model),
        assemble=lambda params: params,
        arguments=(placed["params"], {}, placed.get("batch_stats", {})),
        step=0,
        preprocessing=loaded.preprocessing,
        class_names=loaded.class_names,
    )


def loaded_of(trained: Trained, origin: str) -> Loaded:
    """A run's model, of the checkpoint that was restored; adapters stay on the tree."""
    trainable, frozen, statistics = trained.arguments
    params = trained.assemble({**trainable, **frozen})
    variables = {"params": params, **({"batch_stats": statistics} if statistics else {})}
    return Loaded(trained.model, variables, trained.class_names, trained.preprocessing, origin)


def evaluate(
    loaded: Loaded,
    variables: Variables,
    data: str | os.PathLike[str],
    *,
    images: str | os.PathLike[str] = "",
    batch_size: int = 64,
) -> Evaluation:
    """The numbers of a run's evaluation, over all of a data set and on all devices.

    Args:
      loaded: the model.
      variables: its arrays, or trained ones.
      data: what config.data.eval takes: a folder of class folders, a list of paths and labels,
        `embedded:fashion_mnist/test`; a detector's annotations, COCO JSON, say. Classes are matched
        by name.
      images: the folder of a detector's images, where the annotations don't name it.
      batch_size: images at once, over all devices.

    Returns:
      A task's Evaluation: its `summary` is a dict of figures (top1, loss, ece, per_class ... or
      COCO's ap, ap50 ...), `line()` a line for the screen.

    Raises:
      UserError: data that cannot be read, or classes that the model hasn't.
    """
    family = loaded.family
    task, config = find_task(family.task), default_config(family.task)
    config.data.eval = os.fspath(data)
    config.evaluate.batch_size = batch_size
    if family.task == "detection":
        config.data.eval_images = os.fspath(images)
    source = task.read_eval_source(config, loaded.class_names)
    mesh = sharding.make_mesh(**config.mesh)
    apply = families.make_apply(loaded.model)
    outputs_fn = task.make_outputs(
        config, loaded.model, family.predicts, apply, lambda params: params
    )
    run = task.make_evaluate(config, outputs_fn, mesh, source, loaded.preprocessing)
    placed = jax.device_put(dict(variables), sharding.replicated(mesh))
    return run(placed["params"], {}, placed.get("batch_stats", {}))


def save(
    directory: str | os.PathLike[str],
    loaded: Loaded,
    variables: Variables,
    *,
    to: str | None = None,
) -> list[Path]:
    """Writes a model so that timm, torchvision or transformers load it strictly, and `load`, too.

    Args:
      directory: made if it is not there; files of the same name are replaced.
      loaded: the model.
      variables: its arrays; adapters are merged.
      to: whose naming and config: "timm", "torchvision", "transformers", "npz", "detr" or "yolox".
        None is timm's, and transformers' for what timm has not, or its own repository's.

    Returns:
      The files.

    Raises:
      UserError: the library has no such model, or the folder cannot be written.
    """
    family = families.family_of(loaded.model)
    flat = {
        **paths.flatten(lora.merge(variables["params"])),
        **paths.flatten(variables.get("batch_stats", {})),
    }
    return write_package(
        expand(directory),
        jax.device_get(flat),
        family,
        convert.arguments_of(loaded.model),
        to=to or convert.own_naming(family),
        class_names=loaded.class_names,
        preprocessing=asdict(loaded.preprocessing),
    )


def export_adapter(
    directory: str | os.PathLike[str],
    loaded: Loaded,
    params: Any,
    *,
    trained: Collection[str] = (),
    to: str | None = None,
) -> None:
    """Writes adapters in PEFT's layout, for `peft.PeftModel.from_pretrained`.

    Args:
      directory: made if it is not there.
      loaded: the model that they are for.
      params: the parameter tree with the adapters on it.
      trained: paths of arrays that were trained, a new head's, say; they are saved beside the
        adapters. Paths of the adapters themselves may be among them.
      to: whose model PEFT will load them into: "timm" or "transformers". None is as for `save`.

    Raises:
      UserError: no adapter in `params`, or one that the library has no module for.
    """
    family = families.family_of(loaded.model)
    peft.write_adapter(
        expand(directory),
        params,
        family=family,
        arguments=convert.arguments_of(loaded.model),
        base_model_name=loaded.origin,
        naming=to or convert.own_naming(family),
        modules_to_save=set(trained) - lora.adapter_paths(params),
    )


def import_adapter(directory: str | os.PathLike[str], loaded: Loaded) -> Any:
    """Reads an adapter in PEFT's layout.

    Args:
      directory: with adapter_config.json and adapter_model.safetensors.
      loaded: the model that it is for.

    Returns:
      The parameter tree with the adapters on it, and what was trained beside them.

    Raises:
      UserError: a damaged file, or an adapter of another kind or for another model.
    """
    return peft.read_adapter(
        expand(directory),
        loaded.variables["params"],
        family=families.family_of(loaded.model),
        arguments=convert.arguments_of(loaded.model),
    )


# Arguments of load -------------------------------------------------------------------------------


def _spec(weights: str | os.PathLike[str]) -> str:
    """What `convert.read_weights` takes; a name of the zoo becomes the address of its weights."""
    spec = os.fspath(weights) if isinstance(weights, str | os.PathLike) else ""
    if not spec:
        raise UserError(f"load({weights!r}): name weights, such as 'embedded:vit_cifar10'")
    if _ZOO_NAME.fullmatch(spec) and not expand(spec).exists():
        return published(spec)[1]
    return spec


def _own_names(weights: convert.Weights, num_classes: int) -> tuple[str, ...]:
    """The weights' class names, or numbered ones if they bring none for their head."""
    names = convert.class_names_of(weights) or []
    if len(names) == num_classes:
        return tuple(names)
    return _numbered(num_classes)


def _numbered(num_classes: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{label}" for label in range(num_classes))  # as transformers calls them


def _choose_names(
    own: tuple[str, ...], num_classes: int | None, class_names: Sequence[str] | None
) -> tuple[str, ...]:
    if class_names is not None:
        if isinstance(class_names, str):
            raise UserError(f"class_names {class_names!r} is one text: give a list of names")
        if num_classes not in (None, len(class_names)):
            raise UserError(
                f"num_classes {num_classes} and {len(class_names)} class_names: give one of both"
            )
        return tuple(class_names)
    if num_classes is None or num_classes == len(own):
        return own
    if not isinstance(num_classes, int) or num_classes < 0:
        raise UserError(f"num_classes {num_classes}: give 1 or more, or 0 to leave the head out")
    return _numbered(num_classes)


def _make_preprocessing(
    weights: convert.Weights,
    family: str,
    arguments: Mapping[str, Any],
    image_size: int | tuple[int, int] | None,
) -> Any:
    """The weights' own, at another size if one is given."""
    task = FAMILIES[family].task
    given: dict[str, Any] = {}
    if image_size is not None:
        size = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
        if len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
            raise UserError(f"image_size {image_size!r}: give pixels a side, or (height, width)")
        if task == "detection" and size[0] != size[1]:
            raise UserError(f"image_size {size}: a detector takes squares; give one number")
        given["image_size"] = tuple(size)
    made = find_task(task).make_preprocessing(
        default_config(task),
        {**FAMILIES[family].preprocessing, **(weights.preprocessing or {})},
        {**arguments, **given},
    )
    if made is None:
        raise UserError(
            f"{weights.origin}: nothing says how large its images are: give image_size, 224, say"
        )
    return made


def _compute_dtype(dtype: Any) -> Any:
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = str(dtype)
    if name == "float64":
        if not jax.config.read("jax_enable_x64"):
            raise UserError('dtype float64: first call jax.config.update("jax_enable_x64", True)')
        return jnp.float64
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is none of {', '.join([*DTYPES, 'float64'])}")
    return DTYPES[name]


def _widen(array: jax.Array) -> jax.Array:
    return array.astype(jnp.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


# Images ------------------------------------------------------------------------------------------


def _listed(images: Any) -> list[Any]:
    several = images.ndim == 4 if isinstance(images, np.ndarray) else isinstance(images, Sequence)
    return list(images) if several and not isinstance(images, str) else [images]


def _to_array(image: Any) -> np.ndarray:
    """uint8[H, W, C] of a file, a PIL image or an array."""
    if isinstance(image, str | os.PathLike):
        return FileReader(Path(), (str(expand(image)),)).read(0)
    if isinstance(image, Image.Image):
        return image_to_array(image, name="preprocess: an image")
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        what = f"{image.dtype}{list(image.shape)}" if hasattr(image, "dtype") else type(image)
        raise UserError(
            f"preprocess: {what} is no path, PIL image or uint8 array [H, W, C]; floats in [0, 1] "
            "of the model's size go to apply as they are"
        )
    if 0 in image.shape:
        raise UserError(f"preprocess: an empty image, {image.shape}")
    return image if image.ndim == 3 else image[..., None]


def _pad(arrays: Sequence[np.ndarray], preprocessing: DetectionPreprocessing) -> Padded:
    """Each image resized as in evaluation, all on a canvas that holds the canvas of each."""
    sizes = [(array.shape[0], array.shape[1]) for array in arrays]
    own = [
        preprocessing.buckets[
            choose_bucket(resized_size(size, preprocessing), preprocessing.buckets)
        ]
        for size in sizes
    ]
    height, width = np.max(own, axis=0)
    no_boxes = np.zeros((0, 4))
    views = [
        detection_eval_transform(array, no_boxes, preprocessing, bucket)[0]
        for array, bucket in zip(arrays, own, strict=True)
    ]
    images = np.zeros((len(views), height, width, len(preprocessing.mean)), np.float32)
    for image, view in zip(images, views, strict=True):
        image[: view.shape[0], : view.shape[1]] = view.astype(np.float32) / 255
    valid = jnp.array([view.shape[:2] for view in views])
    mask = np.asarray(pixel_mask(valid, (height, width)))
    return Padded(images, mask, np.array(sizes, np.int32))
