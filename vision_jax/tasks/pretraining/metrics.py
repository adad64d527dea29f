"""The reconstruction of held-out images: its loss, and whether it is the same everywhere."""

from typing import Any

import numpy as np

from vision_jax.errors import DivergedError

CONSTANT = 0.02  # spread of predicted patches, as a share of the true ones', below which all agree


def summarize(
    losses: np.ndarray, spreads: np.ndarray, target_spreads: np.ndarray
) -> dict[str, Any]:
    """The figures of a dataset, as plain numbers that JSON can hold.

    Args:
      losses: f[N], of each image over its hidden patches.
      spreads: f[N], how far the predicted hidden patches of an image are from each other.
      target_spreads: f[N], the same of the true ones.

    Returns:
      loss: the mean.
      spread: the mean of spreads over that of target_spreads; 0 where all patches of an image get
        the same prediction, or None where the true ones are all alike.
      count: N.

    Raises:
      UserError: a loss that is not finite.
    """
    bad = int(np.sum(~np.isfinite(losses)))
    if bad:
        raise DivergedError(
            f"evaluation: the reconstruction is not finite for {bad} of {len(losses)} images; the "
            "weights are damaged or training diverged"
        )
    true = float(np.mean(target_spreads, dtype=np.float64))
    return {
        "loss": float(np.mean(losses, dtype=np.float64)),
        "spread": float(np.mean(spreads, dtype=np.float64)) / true if true > 0 else None,
        "count": len(losses),
    }


def diagnose(summary: dict[str, Any], step: int, warn_after: int) -> list[str]:
    """A warning about a reconstruction that is constant, or that there is nothing to reconstruct.

    Examples:
      >>> diagnose({"loss": 1.0, "spread": 0.4}, 500, 200)
      []
      >>> len(diagnose({"loss": 1.0, "spread": 0.001}, 500, 200))
      1
    """
    spread = summary["spread"]
    if spread is None:
        return ["all hidden patches of the evaluation images are alike: are the images blank?"]
    if step < warn_after or spread >= CONSTANT:
        return []
    return [
        f"constant reconstruction: every hidden patch of an image gets the same pixels (their "
        f"spread is {spread:.1e} of the true patches'), so nothing is learned of the images: the "
        "rate is too high, or the run still in its warm-up; try a tenth of config.optim.lr"
    ]
