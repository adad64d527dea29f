"""Techniques as transforms of the training objective; see objective.py."""
