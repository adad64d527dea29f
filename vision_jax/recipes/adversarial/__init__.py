"""Training against attacks: the losses (objective.py) and the recipe of a config (recipe.py)."""
