"""Transforms of the parameter tree: selection by path, structured leaves, LoRA."""
