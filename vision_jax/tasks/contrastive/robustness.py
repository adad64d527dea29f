"""Robustness is of what a model predicts for labels; here there are none, and a line says so."""

from vision_jax.tasks.pretraining.robustness import refuse

__all__ = ["refuse"]
