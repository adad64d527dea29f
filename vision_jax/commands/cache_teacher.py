"""cache-teacher: the teacher outputs of each image of a run, as the file config.distill.cache."""

from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from vision_jax import machine, sharding
from vision_jax.config import check_ranges
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.teacher_cache import write_teacher_cache
from vision_jax.errors import UserError
from vision_jax.logging import human_size, say, show_progress
from vision_jax.recipes.distillation.recipe import Distill
from vision_jax.run.prepare import prepare
from vision_jax.tasks.api import find_task


def run(config: ConfigDict) -> int:
    """Runs the teachers once over all steps of a run; returns the exit code.

    Raises:
      UserError: no such file is named, several processes, or a config that could not be trained.
    """
    if "distill" not in config.recipes or not config.distill.cache:
        raise UserError("cache-teacher writes config.distill.cache: set it, with distill a recipe")
    if jax.process_count() > 1:
        raise UserError("cache-teacher runs in one process")
    check_ranges(config)
    source, _ = find_task(config.task).read_sources(config)
    prepared = prepare(config, source.class_names)
    recipe = next(one for one in prepared.recipes if isinstance(one, Distill))
    data = prepared.training_data(source, DamageLog())
    teacher_outputs = machine.jit(
        recipe.make_teacher_outputs(prepared.plain_objective, prepared.student),
        out_shardings=sharding.replicated(prepared.mesh),
    )
    arrays = recipe.place_teachers(prepared.mesh)
    place_batch = sharding.make_batch_placer(prepared.mesh)
    path = Path(config.distill.cache)

    def batches(advance: Callable[[], None]) -> Iterator[dict[str, np.ndarray]]:
        for step in range(config.total_steps):
            batch = place_batch(next(data))
            yield jax.device_get(teacher_outputs(arrays, batch, np.int32(step)))
            advance()

    for origin, sha256 in recipe.sources():
        say(f"teacher: {origin} (sha256 {sha256[:16]})")
    with show_progress(config.total_steps) as (advance, _):
        identity = recipe.identity(prepared.views)
        count = write_teacher_cache(path, batches(advance), identity)
    size = human_size(path.stat().st_size)
    say(f"wrote {path}: the teacher outputs of {count} images, {size}")
    return 0
