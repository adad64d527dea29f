"""Techniques as transforms of tree and objective, behind one protocol (recipe.py)."""
