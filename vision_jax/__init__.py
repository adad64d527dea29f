"""Fine-tune large vision models in JAX, from anybody's PyTorch weights."""

__version__ = "0.2.0"
