"""Robustness is of what a model predicts for labels; here there are none, and a line says so."""

from pathlib import Path
from typing import NoReturn

from vision_jax.errors import UserError


def refuse(workdir: Path) -> NoReturn:
    """Raises UserError, which names the way: fine-tune the run of this folder first."""
    raise UserError(
        f"robustness is of a model that predicts labels, and {workdir} holds a pretraining run: "
        f"fine-tune it first, with config.model.weights={workdir}"
    )
