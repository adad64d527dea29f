"""Metrics over a dataset, and the figures drawn from them."""
