"""Adapters, adversarial training, distillation."""

from vision_jax.config.fields.field import (
    ABOVE_0,
    ANY,
    BELOW_1,
    CLASSIFICATION,
    COUNT,
    DETECTION,
    FROM_0,
    MATCHES,
    MOST,
    NOT_NEGATIVE,
    NUMBERS,
    RULES,
    SHARE,
    TEACHERS,
    Check,
    field,
    one_of,
)

FIELDS = (
    # Adapters.
    field("lora.rules", (), RULES, "kernels that get an adapter: regexes over whole paths"),
    field("lora.rank", 8, COUNT, "rank of the adapters' update"),
    field("lora.alpha", 16.0, ABOVE_0, "the update is scaled by alpha / rank"),
    field(
        "lora.rank_stabilized",
        False,
        ANY,
        "scale the update by alpha / sqrt(rank) instead (rsLoRA)",
    ),
    field("lora.dropout", 0.0, BELOW_1, "probability of dropout on an adapter's input"),
    field("lora.dora", False, ANY, "train each output's magnitude too (DoRA)"),
    field(
        "lora.qkv_parts",
        "",
        ANY,
        "parts of a fused qkv kernel with adapters of their own, such as q,v; empty: one for all",
    ),
    field("lora.init_from", "", ANY, "folder of a PEFT adapter to start from, instead of rules"),
    # Adversarial training.
    field(
        "adversarial.method",
        "pgd",
        one_of("pgd", "fast", "free", "trades", "mart"),
        "the method; detectors have the first three",
    ),
    field("adversarial.norm", "linf", one_of("linf", "l2"), "norm that bounds a perturbation"),
    field(
        "adversarial.epsilon",
        4 / 255,
        ABOVE_0,
        "largest norm of a perturbation; images are in [0, 1]",
    ),
    field("adversarial.steps", 3, COUNT, "steps of each attack (fast and free have one)"),
    field(
        "adversarial.step_size",
        0.0,
        NOT_NEGATIVE,
        "length of a step as a share of epsilon; 0 takes the method's usual one",
    ),
    field("adversarial.beta", 6.0, NOT_NEGATIVE, "weight of the KL divergence in trades and mart"),
    field(
        "adversarial.replays",
        4,
        Check(lambda value: 2 <= value < MOST, "at least 2"),
        "updates on each batch in free",
    ),
    field(
        "adversarial.weight_epsilon",
        0.0,
        NOT_NEGATIVE,
        "size of the perturbation of kernels, as a share of their norm (AWP); 0 for none",
    ),
    field(
        "adversarial.warmup_steps", 0, FROM_0, "updates over which epsilon grows linearly from 0"
    ),
    field(
        "adversarial.watch",
        200,
        FROM_0,
        "held-out images that each evaluation attacks by FGSM and PGD; 0 for none",
        CLASSIFICATION,
    ),
    # Learning from teachers.
    field(
        "distill.teachers",
        (),
        TEACHERS,
        "finished runs, or weights as in model.weights; ema: the student's own moving average",
    ),
    field(
        "distill.teacher_weights",
        (),
        NUMBERS,
        "weights of several teachers' probabilities; () for equal ones",
    ),
    field(
        "distill.dtype",
        "float32",
        one_of("float32", "bfloat16"),
        "dtype that teachers are kept in and compute in",
    ),
    field(
        "distill.logits",
        "soft",
        one_of("soft", "hard", "decoupled", "queries", "detections", "cells", "none"),
        "loss of the teachers' logits; DETRs have queries, YOLOX detections or cells",
        detection="queries",
    ),
    field(
        "distill.temperature",
        4.0,
        ABOVE_0,
        "temperature of soft, decoupled, queries and cells",
        detection=1.0,
    ),
    field(
        "distill.weight",
        0.5,
        SHARE,
        "weight of the loss of the logits; that of the labels has the rest of 1",
    ),
    field(
        "distill.least_score",
        0.3,
        SHARE,
        "score from which a teacher's detections are learned",
        DETECTION,
    ),
    field(
        "distill.token",
        False,
        ANY,
        "teacher logits train the distillation token, labels the class token (DeiT)",
    ),
    field(
        "distill.features",
        (),
        MATCHES,
        "((kind, layer, layer of the first teacher, weight), ...) to compare; docs/distillation.md",
    ),
    field(
        "distill.top_k",
        0,
        FROM_0,
        "largest teacher logits that are kept, for a smaller cache; 0 for all",
    ),
    field(
        "distill.cache",
        "",
        ANY,
        "file of cached teacher outputs, written by cache-teacher; empty: the teachers are run",
    ),
)
