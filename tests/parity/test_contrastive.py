"""NT-Xent against lightly 1.6, values and gradients, and the projection head in its naming."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vision_jax import convert
from vision_jax.models.families import build_model
from vision_jax.ops.contrastive import nt_xent_losses
from vision_jax.trees.paths import flatten

losses = pytest.importorskip("lightly.loss")
heads = pytest.importorskip("lightly.models.modules.heads")

BARS = {"float32": 1e-5, "float64": 1e-10}


def near(ours, theirs, bar):
    theirs = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max() <= bar


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("temperature", [0.5, 0.07])
def test_nt_xent(rng, dtype, temperature):
    given = rng.normal(size=(7, 2, 5)).astype(dtype)
    inputs = torch.from_numpy(given).requires_grad_()
    theirs = losses.NTXentLoss(temperature)(inputs[:, 0], inputs[:, 1])
    theirs.backward()
    with jax.enable_x64(dtype == "float64"):
        loss = jax.value_and_grad(lambda x: nt_xent_losses(x, temperature).mean())
        value, gradient = loss(jnp.asarray(given))
        assert value.dtype == dtype
        near(value, theirs, BARS[dtype])
        near(gradient, inputs.grad, BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
def test_the_head_is_lightlys_without_batch_norm(rng, dtype):
    sizes = {"width": 12, "depth": 1, "num_heads": 2, "mlp_width": 8, "patch_size": 4}
    arguments = {**sizes, "image_size": (8, 8), "head_width": 6, "head_depth": 3, "projection": 5}
    model = build_model("simclr", num_classes=0, dtype=jnp.dtype(dtype), **arguments)
    with jax.enable_x64(dtype == "float64"):
        images = jnp.asarray(rng.random((3, 8, 8, 3)), dtype)
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), shapes)
        outputs = jax.jit(model.apply)(variables, images)
        flat = flatten(variables["params"])
        known = convert.arguments_of(model)
        tensors, _ = convert.export_weights(flat, "simclr", known, to="timm")
    prefix = "projection_head."
    theirs = heads.SimCLRProjectionHead(12, 6, 5, num_layers=3, batch_norm=False)
    theirs = theirs.to(getattr(torch, dtype))
    named = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    theirs.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in named.items()})
    found = theirs(torch.from_numpy(np.array(outputs["token"])))
    near(outputs["logits"], found, BARS[dtype])
