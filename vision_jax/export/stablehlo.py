"""StableHLO by jax.export: a file that JAX runs on CPU, GPU and TPU, without the model's code."""

from typing import Any

import jax

from vision_jax import platform
from vision_jax.export.serving import Serving

PLATFORMS = ("cpu", "cuda", "tpu")
# https://docs.jax.dev/en/latest/export/export.html, "Compatibility guarantees".
READERS = (
    "the JAX that wrote it and later ones, which JAX promises for six months; of earlier ones those"
    " of the three weeks before at most"
)


def write(serving: Serving, batch: int | None) -> tuple[bytes, dict[str, Any]]:
    """(what the file holds, what its description says).

    Args:
      serving: of the model.
      batch: images at once; None: any number.
    """
    with platform.traced_for(platform.ANY):
        made = jax.export.export(jax.jit(serving.function), platforms=PLATFORMS)(
            serving.images_spec(batch)
        )
    return bytes(made.serialize()), {
        "platforms": list(made.platforms),
        "jax": jax.__version__,
        "calling_convention_version": made.calling_convention_version,
        "calling_conventions_of_this_jax": [
            jax.export.minimum_supported_calling_convention_version,
            jax.export.maximum_supported_calling_convention_version,
        ],
        "read_by": READERS,
    }
