"""The optimizer."""

from vision_jax.config.fields.field import (
    BELOW_1,
    COUNT,
    FROM_0,
    MULTIPLIERS,
    NOT_NEGATIVE,
    UP_TO_1,
    field,
    one_of,
)

FIELDS = (
    field(
        "optim.name",
        "adamw",
        one_of("adamw", "sgd", "lars", "lamb", "lion", "muon"),
        "the optimizer",
    ),
    field("optim.lr", 1e-3, NOT_NEGATIVE, "the peak of the learning rate", detection=1e-4),
    field(
        "optim.schedule",
        "cosine",
        one_of("cosine", "linear", "constant", "step"),
        "the learning rate's schedule after the warm-up",
    ),
    field(
        "optim.warmup_steps", 100, FROM_0, "updates over which the learning rate rises to its peak"
    ),
    field(
        "optim.drop_at",
        2 / 3,
        UP_TO_1,
        "share of all updates after which the schedule step falls to a tenth",
    ),
    field(
        "optim.weight_decay",
        0.05,
        NOT_NEGATIVE,
        "weight decay of kernels and adapters; biases, norms and embeddings have none",
        detection=1e-4,
        self_distillation=0.04,
    ),
    field(
        "optim.final_weight_decay",
        0.0,
        NOT_NEGATIVE,
        "weight decay at the end of half a cosine; 0 keeps optim.weight_decay",
    ),
    field("optim.b1", 0.9, BELOW_1, "decay of the first moment in adamw, lamb, lion and muon"),
    field(
        "optim.b2",
        0.999,
        BELOW_1,
        "decay of the second moment in adamw, lamb, lion and muon",
        pretraining=0.95,
    ),
    field("optim.momentum", 0.9, BELOW_1, "momentum of sgd, lars and muon"),
    field(
        "optim.clip_norm",
        1.0,
        NOT_NEGATIVE,
        "largest global norm of the gradient; 0 turns clipping off",
        detection=0.1,
        self_distillation=3.0,
    ),
    field(
        "optim.layer_decay",
        1.0,
        UP_TO_1,
        "each earlier layer's learning rate is this times the next one's",
    ),
    field(
        "optim.lr_multipliers",
        (),
        MULTIPLIERS,
        "pairs (path regex, factor of the learning rate); the first that matches counts",
    ),
    field("optim.accumulate", 1, COUNT, "micro-batches per update"),
    field(
        "optim.ema_decay",
        0.0,
        BELOW_1,
        "decay of the moving average of what trains, which evaluation uses; 0 for none",
        self_distillation=0.996,
        generation=0.999,
    ),
)
