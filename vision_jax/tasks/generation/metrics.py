"""The error of the velocity over held-out images."""

from typing import Any

import numpy as np

from vision_jax.errors import DivergedError


def summarize(losses: np.ndarray) -> dict[str, Any]:
    """The figures of a dataset, as plain numbers that JSON can hold.

    Args:
      losses: f[N], of each image.

    Returns:
      loss: the mean.
      count: N.

    Raises:
      UserError: a loss that is not finite.

    Examples:
      >>> summarize(np.array([0.25, 0.75]))
      {'loss': 0.5, 'count': 2}
    """
    bad = int(np.sum(~np.isfinite(losses)))
    if bad:
        raise DivergedError(
            f"evaluation: the loss is not finite for {bad} of {len(losses)} images; the weights "
            "are damaged or training diverged"
        )
    return {"loss": float(np.mean(losses, dtype=np.float64)), "count": len(losses)}
