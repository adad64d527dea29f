"""Hyper-parameter search: many trials of one config in one program.

    space.py      the space, and the trials that a sampler draws
    trial.py      a run as a function of its numbers, and which trials share a program
    stack.py      the trials of one program side by side: states, step, evaluation
    schedule.py   which trials go on at a rung, and how
    journal.py    what is done, on disk; who does what
    drive.py      the search: rung by rung, unit by unit
    report.py     the table, the best trial's workdir, figures and the page

Here stands what a space file needs, which imports no JAX.
"""

from vision_jax.search.space import choice, log_uniform, uniform

__all__ = ["choice", "log_uniform", "uniform"]
