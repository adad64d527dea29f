"""A program that runs a training command until a step, and notes which examples each step took.

    python tests/hosts/elastic.py STOP FOLDER TYPE --config=...

STOP is the step after which it is asked to end, 0 for never; FOLDER gets STEP.PROCESS with the rows
of this process; TYPE is what products are computed in, float32 or float64.
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from vision_jax import figures, main, train
from vision_jax.run import description
from vision_jax.tasks.classification import figures as predictions


def spoil(stop, folder, kind):
    """Has the run stop after that step, note its rows, and compute in that type."""
    for module in (figures, predictions):  # slow, and not what this is about
        module.save_figure = lambda figure, path: Path(path).touch()
    train.STEPS_BETWEEN_AGREEMENTS = 1
    if kind == "float64":
        jax.config.update("jax_enable_x64", True)
        description.DTYPES["float32"] = jax.numpy.float64
    report, make_program = train._Reporter.__call__, train._make_program

    def stop_after(self, step, metrics):
        report(self, step, metrics)
        if step == stop - 1:  # this step is read while the next one computes
            os.kill(os.getpid(), signal.SIGTERM)

    def noting(prepared, facts, begin):
        program = make_program(prepared, facts, begin)

        def next_batch(step):
            batch = program.next_batch(step)
            shards = {s.index[0].start or 0: s.data for s in batch["index"].addressable_shards}
            rows = np.concatenate([np.asarray(shards[at]) for at in sorted(shards)])
            np.save(folder / f"{step}.{jax.process_index()}.npy", rows)
            return batch

        return dataclasses.replace(program, next_batch=next_batch)

    train._Reporter.__call__ = stop_after
    train._make_program = noting


if __name__ == "__main__":
    stop, folder, kind = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    del sys.argv[1:4]
    spoil(stop, folder, kind)
    main.command()
