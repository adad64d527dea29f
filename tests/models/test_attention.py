"""Attention in the forms of all platforms, with and without a bias."""

import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.models.attention import attend

RNG = np.random.default_rng(0)


def reference(q, k, v, bias, scale):
    logits = np.einsum("bnkd,bmkd->bknm", q, k) * scale + bias
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bknm,bmkd->bnkd", weights, v)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("shape", [None, (3, 5, 6), (1, 3, 5, 6), (2, 1, 5, 6)])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_equals_the_formula(platform, shape, scale):
    q = RNG.normal(size=(2, 5, 3, 8))
    k, v = RNG.normal(size=(2, 2, 6, 3, 8))
    bias = 0.0 if shape is None else RNG.normal(size=shape)
    expected = reference(q, k, v, bias, 8**-0.5 if scale is None else scale)
    given = None if shape is None else jnp.asarray(bias, jnp.float32)
    arrays = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    ours = attend(*arrays, bias=given, scale=scale, platform=platform)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
