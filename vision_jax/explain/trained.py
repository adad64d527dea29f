"""A run's training images, of what lies in their place today."""

from dataclasses import replace

import numpy as np

from vision_jax.data.fingerprint import Fingerprint, describe_changes, take_fingerprint
from vision_jax.data.sources import Source
from vision_jax.errors import UserError


def trained_on(
    source: Source, class_names: tuple[str, ...], before: Fingerprint
) -> tuple[Source, str]:
    """Those images that the run was trained on, by name, and what became of them.

    What was added since, and what was held out, is left out: a split of today's images could be
    another one. Labels become those of the run.

    Args:
      source: all that there is today.
      class_names: of the run.
      before: of the run's training data.

    Returns:
      (the images, what is edited or gone or has another class, or "").

    Raises:
      UserError: none is left.
    """
    position = {name: label for label, name in enumerate(class_names)}
    table = np.array([position.get(name, -1) for name in source.class_names], np.int32)
    labels, names = table[source.labels], set(before["name"])
    rows = source.rows.tolist()
    kept = np.array([source.reader.relative_name(row) in names for row in rows], bool)
    kept &= labels >= 0
    if not kept.any():
        raise UserError(
            f"{source.name}: none of the images that the run was trained on is there any more: "
            "bring them back, or name others with --train=DATA"
        )
    found = replace(
        source, class_names=class_names, labels=labels[kept], rows=source.rows[kept], note=""
    )
    return found, describe_changes(before, take_fingerprint(found))
