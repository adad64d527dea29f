"""What a method repeats, it repeats in the memory of one: nodes, samples, squares, masks."""

import jax
import jax.numpy as jnp
import pytest

from vision_jax.attacks.examples import keys_of
from vision_jax.explain.forward import Forward, class_logit
from vision_jax.explain.methods import make_explain
from vision_jax.models.families import build_model, initialize

SIDE = 32
VIT = {
    "num_classes": 4, "image_size": (SIDE, SIDE), "patch_size": 8, "width": 32, "depth": 2,
    "num_heads": 2, "mlp_width": 64,
}  # fmt: skip
# How often more a method repeats in the second than in the first.
REPEATED = {
    "integrated_gradients": ({"nodes": 10}, {"nodes": 200}),
    "smooth_grad": ({"samples": 5}, {"samples": 100}),
    "occlusion": ({"window": 8, "stride": 8}, {"window": 8, "stride": 2}),  # 16 and 169
    "feature_ablation": ({"cells": 3}, {"cells": 14}),
    "rise": ({"masks": 10}, {"masks": 500}),
}


@pytest.mark.long(but=("integrated_gradients",))
@pytest.mark.parametrize("name", REPEATED)
def test_memory_does_not_grow_with_what_is_repeated(name):
    """But for what is given of each step: a weight, a place, a number."""
    model = build_model("vit", **VIT)
    variables = jax.eval_shape(lambda: initialize(model, jax.random.key(0), (SIDE, SIDE)))
    images = jnp.zeros((8, SIDE, SIDE, 3), jnp.float32)
    given = (
        variables,
        images,
        class_logit(jnp.arange(8) % 4),
        keys_of(jax.random.key(0), jnp.arange(8)),
    )

    def temporaries(options):
        compiled = make_explain(Forward(model), name, **options).lower(*given).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = map(temporaries, REPEATED[name])
    assert few > images.nbytes  # what is measured is there
    assert many - few <= 4096
