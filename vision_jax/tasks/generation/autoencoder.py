"""The autoencoder around a generator of latents: images in, images out, never trained here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax import convert
from vision_jax import platform as platforms
from vision_jax.data.transforms import Preprocessing
from vision_jax.errors import UserError
from vision_jax.files import expand
from vision_jax.models import families
from vision_jax.models.autoencoder import Autoencoder as Architecture
from vision_jax.models.families import FAMILIES, RUN_ARGUMENTS
from vision_jax.ops.images import to_float
from vision_jax.tasks.generation.objective import one_by_one

EXAMPLES = "hf://stabilityai/sd-vae-ft-mse, say, or a folder or file of one's weights"


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Autoencoder:
    """A pretrained autoencoder, whose arrays are read when they are asked for.

    Attributes:
      model: the flax module.
      weights: that it is of.
    """

    model: Any
    weights: convert.Weights

    @property
    def cell(self) -> int:
        """Pixels a side of a cell of the latents."""
        return self.model.size_divisor

    @property
    def scales(self) -> tuple[float, float]:
        """(scaling_factor, shift_factor) of the latents."""
        return self.model.scaling_factor, self.model.shift_factor

    @property
    def identity(self) -> dict[str, Any]:
        """What latents depend on beside the images."""
        return {"autoencoder": self.weights.sha256, **computed_by(self.model)}

    @cached_property
    def variables(self) -> Any:
        """{"params": nested dicts of arrays}."""
        return convert.variables_of(self.weights, self.model)

    def pixels(self, preprocessing: Preprocessing) -> Preprocessing:
        """How images are prepared, of how the generator's latents are described."""
        height, width = preprocessing.image_size
        gray = (0.5,) * self.model.in_channels
        return replace(
            preprocessing, image_size=(height * self.cell, width * self.cell), mean=gray, std=gray
        )

    def shapes(self, cells: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """Of what `posterior` gives of an image with so many cells."""
        shape = (1, *(side * self.cell for side in cells), self.model.in_channels)
        images = jax.ShapeDtypeStruct(shape, jnp.float32)
        like = jax.eval_shape(self.model.init, jax.random.key(0), images)
        found = jax.eval_shape(self.posterior, like, images)
        return {name: leaf.shape[1:] for name, leaf in found.items()}

    def posterior(self, variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        """{"mean", and perhaps "logvar": f32[B, h, w, Z]} of images f32[B, H, W, C] in [0, 1]."""
        mean, logvar = self.model.apply(variables, images, method="posterior")
        return {"mean": mean} if logvar is None else {"mean": mean, "logvar": logvar}

    def encoded(self, images: np.ndarray) -> Mapping[str, np.ndarray]:
        """`posterior` of images u8[B, H, W, C], on the host."""
        return jax.device_get(self._encoded(self.variables, images))

    @cached_property
    def _encoded(self) -> Callable[..., dict[str, jax.Array]]:
        return jax.jit(lambda arrays, images: self.posterior(arrays, to_float(images)))

    def encode(self, variables: Any, images: jax.Array) -> jax.Array:
        """The means of the latents f32[B, h, w, Z], scaled, of images in [0, 1]."""
        return self.model.apply(variables, images, method="encode")

    def decode(self, variables: Any, latents: jax.Array) -> jax.Array:
        """Images f32[B, H, W, C] in [0, 1] of scaled latents."""
        return jnp.clip(self.model.apply(variables, latents, method="decode"), 0, 1)

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """Images u8[B, H, W, C] of scaled latents f[B, h, w, Z], the same in every batch."""
        images = self._decoded(self.variables, latents)
        return np.asarray(jnp.round(255 * images)).astype(np.uint8)

    @cached_property
    def _decoded(self) -> Callable[..., jax.Array]:
        return jax.jit(lambda arrays, x: one_by_one(partial(self.decode, arrays), x))


def read_autoencoder(spec: str, *, allow_pickle: bool, field: str) -> Autoencoder:
    """An autoencoder by its weights, as `convert.read_weights` takes them; no array is read.

    Args:
      spec: where they are.
      allow_pickle: read pickled files too.
      field: where `spec` comes from, for messages.

    Raises:
      UserError: no such weights, or none of an autoencoder.
    """
    family, found = _read(spec, allow_pickle, state_of(spec))
    if found is None:
        raise UserError(f"{field}: {spec} is a {family}, which encodes no images: take {EXAMPLES}")
    return found


@lru_cache(maxsize=2)  # one start asks several times, and a hash of large files takes a while
def _read(spec: str, allow_pickle: bool, state: Any) -> tuple[str, Autoencoder | None]:
    del state
    weights = convert.read_weights(spec, allow_pickle=allow_pickle)
    family, arguments = convert.recognize(weights)
    if not issubclass(FAMILIES[family].model, Architecture):  # type: ignore[arg-type]
        return family, None
    return family, Autoencoder(families.build_model(family, **arguments), weights)


def state_of(spec: str) -> tuple[tuple[str, int, int], ...]:
    """(name, size, time of the last change) of the files that a path stands for."""
    place = expand(spec)
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    found = [(str(path), path.stat()) for path in files if path.is_file()]
    return tuple((name, one.st_size, one.st_mtime_ns) for name, one in found)


def computed_by(model: Any) -> dict[str, Any]:
    """What else the numbers of a frozen model depend on, for JSON."""
    arguments = convert.arguments_of(model).items()
    return {
        "arguments": {k: value for k, value in arguments if k not in RUN_ARGUMENTS},
        "platform": platforms.current(),
        "precision": str(jax.config.values["jax_default_matmul_precision"]),
    }


def check_fits(autoencoder: Autoencoder | None, model: Any, field: str) -> None:
    """Raises UserError where a model's outputs are not what the autoencoder decodes.

    Args:
      autoencoder: None of a model of pixels.
      model: the generator.
      field: that names an autoencoder, for the message.
    """
    channels = model.in_channels
    if autoencoder is None:
        if channels not in (1, 3):
            raise UserError(
                f"{field}: this generator makes latents of {channels} channels, which an "
                f"autoencoder decodes: name its weights, {EXAMPLES}"
            )
    elif autoencoder.model.latent_channels != channels:
        raise UserError(
            f"{field}: latents of {autoencoder.model.latent_channels} channels, and the generator "
            f"takes {channels}: take the autoencoder that it was trained with"
        )
