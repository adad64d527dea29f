"""evaluate: the numbers of a finished run's checkpoint, computed again."""

from pathlib import Path

import jax
from ml_collections import ConfigDict

from vision_jax.evaluation import announce, say_damaged
from vision_jax.logging import say
from vision_jax.run.restore import restore


def run(config: ConfigDict, workdir: Path, checkpoint: str) -> int:
    """Prints them, and what they are class by class; returns the exit code."""
    restored = restore(config, workdir, checkpoint)
    prepared = restored.run
    source = prepared.task.read_eval_source(config, prepared.description.class_names)
    result = prepared.make_evaluate(source)(*restored.trained.arguments)
    if jax.process_index() == 0:
        announce(source)
        say(f"step {int(restored.state.step)}: {result.line()}")
        say_damaged(result.damaged)
        for line in result.lines():
            say(line)
    return 0
