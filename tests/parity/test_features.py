"""What distillation reads of a ViT, its attention and its two heads, against timm."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from vit_references import REFERENCES

from vision_jax import convert
from vision_jax.certify.random_weights import randomize
from vision_jax.models.families import apply_with_features, build_model
from vision_jax.trees.paths import flatten, unflatten


@pytest.mark.parametrize("name", ["timm deit distilled", "timm with qk_norm"])
def test_attention_and_heads_equal_timm(name, tmp_path, rng):
    reference, size = REFERENCES[name]()
    randomize(reference.module, seed=int(rng.integers(1000)))
    family, arguments = convert.recognize(weights := convert.read_weights(reference.save(tmp_path)))
    images = rng.random((2, *size, 3))
    mean, std = np.asarray(arguments["mean"]), np.asarray(arguments["std"])
    expected = {}
    for index, block in enumerate(reference.module.blocks):
        block.attn.fused_attn = False  # so that the probabilities pass through the dropout
        keep = partial(expected.__setitem__, f"block_{index}/attention")
        block.attn.attn_drop.register_forward_hook(lambda *given, keep=keep: keep(given[-1]))
    with torch.no_grad():
        normalized = torch.tensor(((images - mean) / std).transpose(0, 3, 1, 2))
        if "distilled" in name:
            reference.module.train().set_distilled_training(
                True
            )  # without dropout it computes the same
            expected["head"], expected["head_dist"] = reference.module.double()(normalized)
        else:
            reference.module.double()(normalized)
    with jax.enable_x64(True):
        model = build_model(family, **arguments, dtype=jnp.float64)
        like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        flat = convert.import_weights(weights, flatten(like), arguments)
        params = unflatten(like, {path: x.astype(np.float64) for path, x in flat.items()})
        apply = jax.jit(partial(apply_with_features, model, names=list(expected)))
        _, features = apply({"params": params}, images)
    assert len(expected) >= 2
    for name, feature in expected.items():
        largest = feature.abs().max().item()
        np.testing.assert_allclose(features[name], feature.numpy(), rtol=0, atol=1e-12 * largest)
