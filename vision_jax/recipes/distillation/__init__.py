"""Learning from teachers: losses (objective.py), models (teachers.py), a config's (recipe.py)."""
