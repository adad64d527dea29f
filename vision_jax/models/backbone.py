"""What models on a backbone have in common: where it is, what it is made of, layers by depth.

A detector or segmenter keeps the parameters of a classifier, without its head, under "backbone/".
Either it says which one and has its arguments among its own (`OnBackbone`), or it takes those of
many families (`OnAnyBackbone`).
"""

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from vision_jax import limits
from vision_jax.errors import UserError, nearest
from vision_jax.models import convnext, efficientnet, mit, regnet, resnet, swin

# family -> its model, its named variants
ENCODERS: dict[str, tuple[Any, Callable[[str], dict[str, Any] | None]]] = {
    "resnet": (resnet.ResNet, resnet.variant),
    "regnet": (regnet.RegNet, regnet.variant),
    "efficientnet": (efficientnet.EfficientNet, efficientnet.variant),
    "convnext": (convnext.ConvNeXt, convnext.variant),
    "mit": (mit.MixTransformer, mit.variant),
    "swin": (swin.Swin, swin.variant),
}
_NOT_SHARED = ("num_classes", "dropout", "parent", "name")  # the head's, and flax's
_RUN = ("dtype", "remat", "freeze_norm", "drop_path", "in_channels", "mean", "std")
# Of whichever backbone has them: a Swin on images of any size, as transformers has it.
FIXED = {"head_hidden": 0, "library": "transformers", "always_partition": True}


class OnBackbone(nn.Module, abc.ABC):
    """A model on a backbone: a subclass says `_backbone`, and how deep a parameter above it is.

    `_layers_above` counts the layers above the backbone for layer-wise rate decay, and
    `_depth_above` says which of them a parameter is in, by the first part of its path.
    """

    _layers_above = 1

    @property
    def stem(self) -> str:
        """Path of the first convolution's kernel."""
        return f"backbone/{self._backbone(parent=None).stem}"

    @property
    def pyramid(self) -> tuple[tuple[str, int], ...]:
        """Named features of the backbone and their stride in pixels, from fine to coarse."""
        return self._backbone(parent=None).pyramid

    @property
    def num_layers(self) -> int:
        """Layers for layer-wise rate decay: the backbone's without a head, and those above."""
        return self._backbone(parent=None).num_layers - 1 + self._layers_above

    def layer_of(self, path: str) -> int:
        """Depth of a parameter: the backbone's own, then as the model says."""
        top, _, rest = path.partition("/")
        backbone = self._backbone(parent=None)
        above = backbone.num_layers - 1
        if top == "backbone":
            return min(backbone.layer_of(rest), above - 1)  # what only a head would follow
        return above + self._depth_above(top)

    def _depth_above(self, top: str) -> int:
        return self._layers_above - 1

    @abc.abstractmethod
    def _backbone(self, **place):
        """The backbone, where `place` says: its `name`, or `parent=None` to ask it something."""

    def _built(self, model: Any, **given):
        """`model` without a head, with `given` and the arguments that this model has as well."""
        own = {f.name for f in fields(self)} - set(_NOT_SHARED)  # type: ignore[arg-type]
        shared = {f.name: getattr(self, f.name) for f in fields(model) if f.name in own}
        return model(**{"num_classes": 0} | shared | given)


class OnAnyBackbone(OnBackbone):
    """A model whose backbone is of one of many families.

    Attributes:
      num_classes: K.
      encoder: the family of the backbone.
      encoder_arguments: its own, as ((name, value), ...), without what follows here.
      in_channels: of the images; `mean` and `std` have as many entries.
      mean, std: per-channel normalization of the images.
      drop_path: the backbone's, where it has one.
      freeze_norm: BatchNorm keeps its running statistics in training.
      dtype: compute dtype; parameters stay float32. The head computes in float32.
      remat: the backbone recomputes each block in the backward pass.
    """

    num_classes: int
    encoder: str
    encoder_arguments: Any = ()
    in_channels: int = 3
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    drop_path: float = 0.0
    freeze_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    @property
    def _encoder(self) -> Any:
        """The backbone's flax module."""
        return ENCODERS[self.encoder][0]

    def _backbone(self, **place):
        """The backbone.

        Raises:
          UserError: arguments that it does not take.
        """
        model, where = self._encoder, f"{type(self).__name__.lower()}: "
        kinds = {f.name: f.type for f in fields(model)}
        pairs = self.encoder_arguments
        if not isinstance(pairs, tuple | list) or not all(
            isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
            for pair in pairs
        ):
            raise UserError(
                f"{where}encoder_arguments {str(pairs)[:80]}: give ((name, value), ...)"
            )
        arguments = dict(pairs)
        for name, value in arguments.items():
            if name not in kinds or name in (*_RUN, *_NOT_SHARED):
                raise UserError(
                    f"{where}a {self.encoder} takes no {name!r}{nearest(name, list(kinds))}"
                )
            try:
                limits.check_argument(name, value, kinds[name])
            except ValueError as error:
                raise UserError(f"{where}{self.encoder}: {name} {value!r} {error}") from None
        arguments |= {name: value for name, value in FIXED.items() if name in kinds}
        arguments |= {name: getattr(self, name) for name in _RUN if name in kinds}
        try:
            return model(num_classes=0, **arguments, **place)
        except TypeError as error:  # "missing 1 required positional argument"
            raise UserError(f"{where}{self.encoder}: {error}") from error


def on_variant(name: str, prefix: str, families: Iterable[str]) -> dict[str, Any] | None:
    """Arguments of a model on a named backbone ("unet_resnet50" with prefix "unet_"), or None."""
    encoder = name.removeprefix(prefix)
    if encoder == name:
        return None
    for family in families:
        if (arguments := ENCODERS[family][1](encoder)) is not None:
            return {"encoder": family, "encoder_arguments": encoder_pairs(family, arguments)}
    return None


def encoder_pairs(family: str, arguments: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """What of a backbone's arguments `encoder_arguments` must say: those unlike the default.

    Those that are the whole model's own are left out. In the order of their names.
    """
    defaults = {field.name: field.default for field in fields(ENCODERS[family][0])}
    return tuple(
        (name, value)
        for name, value in sorted(arguments.items())
        if name not in (*_RUN, *_NOT_SHARED, *FIXED) and value != defaults[name]
    )
