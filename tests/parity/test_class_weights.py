"""Weights of a classifier's classes beside torch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vision_jax.ops import losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_cross_entropy_and_its_gradient_are_torch_s(smoothing, rng):
    logits, labels = rng.normal(size=(12, 5)) * 3, rng.integers(0, 5, 12)
    weights = rng.uniform(0, 4, 5)
    theirs = torch.from_numpy(logits).requires_grad_()
    one_hot = np.eye(5)[labels] * (1 - smoothing) + smoothing / 5
    loss = F.cross_entropy(theirs, torch.from_numpy(one_hot), torch.from_numpy(weights))
    loss.backward()

    def ours(logits):
        return losses.cross_entropy(logits, jnp.asarray(one_hot), jnp.asarray(weights)).mean()

    with jax.enable_x64(True):
        value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-12)
    np.testing.assert_allclose(gradient, theirs.grad.numpy(), rtol=1e-9, atol=1e-12)
