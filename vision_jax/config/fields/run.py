"""The run: its task, seed, length and recipes."""

from vision_jax.config.fields.field import (
    ABOVE_0,
    AXIS,
    CLASSIFICATION,
    COUNT,
    FROM_0,
    PAIRS,
    RECIPE_NAMES,
    RULES,
    SEED,
    STORE,
    TASKS,
    any_of,
    field,
)

FIELDS = (
    field("task", CLASSIFICATION, any_of(TASKS), "the task"),
    field("seed", 0, SEED, "of initialization, data order, augmentation, dropout and attacks"),
    field(
        "batch_size", 64, COUNT, "images per update, over all devices", detection=8, segmentation=8
    ),
    field("total_steps", 1_000, COUNT, "updates of training", detection=10_000),
    field(
        "checkpoint_every",
        100,
        COUNT,
        "updates between checkpoints; evaluations and the end are checkpointed too",
        detection=500,
    ),
    field(
        "store",
        "",
        STORE,
        "gs://BUCKET/FOLDER or s3://..., where the workdir is copied to",
    ),
    field("log_every", 10, COUNT, "updates between lines in metrics.jsonl"),
    field(
        "mesh.data", -1, AXIS, "devices that split the batch alone; -1 takes all that fsdp leaves"
    ),
    field("mesh.fsdp", 1, AXIS, "devices that split the batch and the parameters (fully sharded)"),
    field(
        "mesh.tensor",
        1,
        COUNT,
        "devices that share each image's heads, MLP channels and classes; docs/training.md",
    ),
    field(
        "mesh.slices",
        1,
        COUNT,
        "TPU slices, or machines with fast links within, that mesh.data goes over",
    ),
    field(
        "sharding_rules",
        (),
        PAIRS,
        "pairs (path regex, mesh axes), tried before the default; docs/training.md",
    ),
    field(
        "hosts.compare_every",
        100,
        FROM_0,
        "of several processes: updates between comparisons of the copies of all arrays; 0 for none",
    ),
    field(
        "hosts.patience",
        40.0,
        ABOVE_0,
        "of several processes: seconds that the others wait in a step for one that is behind",
    ),
    field(
        "trainable",
        (".*",),
        RULES,
        "parameters that train besides adapters: regexes over whole paths",
        pretraining=("(?!(decoder/)?pos_embed$).*",),
    ),
    field(
        "recipes",
        (),
        RECIPE_NAMES,
        "the recipes that are on; each has the section of its name",
    ),
)
