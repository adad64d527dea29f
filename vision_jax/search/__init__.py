"""Hyper-parameter search: many trials of one config in one program.

    space.py      the space, and the trials that a sampler draws
    learned.py    the samplers that learn from earlier trials, Optuna's
    trial.py      a run as a function of its numbers, and which trials share a program
    stack.py      the trials of one program side by side: states, step, evaluation
    schedule.py   which trials go on at a rung, and how
    journal.py    what is done, on disk; who does what
    search.py     what a search is: its inputs, and what follows from them and the journal
    drive.py      the search running: rung by rung, unit by unit
    report.py     the table, the best trial's workdir, figures and the page

Here stands what a space file needs, which imports no JAX.
"""

from vision_jax.search.space import choice, log_uniform, uniform, when

__all__ = ["choice", "log_uniform", "uniform", "when"]
