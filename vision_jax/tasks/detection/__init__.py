"""Boxes with a class each, any number an image."""
