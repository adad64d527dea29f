"""4-bit NormalFloat beside bitsandbytes', whose layout is [out, in] in one row of blocks."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vision_jax.trees.quantized import NF4_CODE, SCALES_BLOCK, dynamic_code, to_nf4

functional = pytest.importorskip("bitsandbytes.functional")


@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shape", [(96, 256), (5, 128), (64, 3, 3, 256)], ids=str)
def test_blocks_are_bitsandbytes(rng, shape, block_size):
    """The same codes; of quantized scales some neighbors, since the mean is rounded otherwise."""
    weight = torch.from_numpy(rng.normal(size=shape).astype(np.float32) * 0.05)
    # Ours [..., in, out]; theirs has an output's weights, in whatever order, beside each other.
    rows = weight.reshape(shape[0], -1)
    kernel = jnp.asarray(rows.numpy().T)
    for double in (False, True):
        theirs, state = functional.quantize_4bit(
            rows, blocksize=block_size, compress_statistics=double, quant_type="nf4"
        )
        np.testing.assert_array_equal(state.code, NF4_CODE)
        ours = to_nf4(kernel, block_size=block_size, double=double)
        np.testing.assert_array_equal(np.asarray(ours.codes).T.reshape(-1, 1), theirs)
        expected = functional.dequantize_4bit(theirs, state).numpy()
        if not double:
            np.testing.assert_array_equal(np.asarray(ours.merge()).T, expected)
            continue
        np.testing.assert_allclose(state.state2.code, dynamic_code(), atol=6e-8)
        assert state.state2.blocksize == SCALES_BLOCK
        np.testing.assert_allclose(ours.absmax_scale, state.state2.absmax, atol=1e-7)
        positions = np.asarray(ours.absmax).T.reshape(-1).astype(int)
        off = np.abs(positions - state.absmax.numpy().astype(int))
        assert off.max() <= 1
        assert (off > 0).mean() <= 0.03
        same = np.repeat(off == 0, block_size)
        ours_flat = np.asarray(ours.merge()).T.reshape(-1)
        np.testing.assert_allclose(
            ours_flat[same], expected.reshape(-1)[same], rtol=2e-6, atol=1e-8
        )
