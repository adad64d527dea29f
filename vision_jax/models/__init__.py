"""Architectures, one file each. The only place that imports flax."""
