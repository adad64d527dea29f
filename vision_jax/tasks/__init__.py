"""What a run may be for: a folder a task, all of the same form (api.py)."""
