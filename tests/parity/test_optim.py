"""Optimizers, clipping and the loss against torch over 20 updates, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from vision_jax import optim
from vision_jax.ops import losses

RNG = np.random.default_rng()
STEPS, LR, WD, MOMENTUM, BETAS, EPS = 20, 3e-3, 0.2, 0.9, (0.85, 0.97), 1e-8


@pytest.mark.parametrize("clip_norm", [0.0, 1.5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_same_weights_as_torch(name, clip_norm):
    shapes = {"head/kernel": (16, 8), "head/bias": (8,)}
    start = {path: RNG.normal(size=shape) for path, shape in shapes.items()}
    gradients = [
        {path: RNG.normal(size=shape) for path, shape in shapes.items()} for _ in range(STEPS)
    ]

    kernel, bias = (torch.nn.Parameter(torch.tensor(array)) for array in start.values())
    groups = [{"params": [kernel], "weight_decay": WD}, {"params": [bias], "weight_decay": 0.0}]
    if name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=EPS)
    else:
        optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM)
    for gradient in gradients:
        kernel.grad, bias.grad = (torch.tensor(array) for array in gradient.values())
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([kernel, bias], clip_norm)
        optimizer.step()

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        tx = optim.make_optimizer(
            name,
            schedule=optim.make_schedule("constant", peak=LR, total_steps=STEPS),
            params=params,
            weight_decay=WD,
            b1=BETAS[0],
            b2=BETAS[1],
            eps=EPS,
            momentum=MOMENTUM,
            clip_norm=clip_norm,
        )
        state, update = tx.init(params), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
        for path, twin in (("head/kernel", kernel), ("head/bias", bias)):
            expected = twin.detach().numpy()
            # The rate and the bias correction are float32, and torch adds 1e-6 to the norm it
            # clips by: the error is relative to what was learned.
            change = np.abs(expected - start[path]).max()
            np.testing.assert_allclose(params[path], expected, rtol=0, atol=1e-6 * change)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_same_cross_entropy_as_torch(smoothing):
    logits, labels = 4 * RNG.normal(size=(32, 11)).astype(np.float32), RNG.integers(0, 11, 32)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=smoothing, reduction="none"
    )
    targets = losses.one_hot_targets(jnp.asarray(labels), 11, smoothing)
    result = losses.cross_entropy(jnp.asarray(logits), targets)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
