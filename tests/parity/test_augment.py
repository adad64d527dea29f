"""Operations and strength tables against torchvision, CutMix's box against timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from timm.data.mixup import cutmix_bbox_and_lam
from torchvision.transforms import v2

from vision_jax.ops import augment

HEIGHT, WIDTH = 26, 34
NAMES = {
    name: "".join(word.capitalize() for word in name.split("_")).replace("contrast", "Contrast")
    for name in augment.OPERATIONS
} | {"autocontrast": "AutoContrast"}
POLICIES = {
    "rand": (v2.RandAugment, augment.rand_augment_strengths(HEIGHT, WIDTH)),
    "trivial": (v2.TrivialAugmentWide, augment.trivial_augment_strengths()),
}
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")


@pytest.mark.parametrize("policy", POLICIES)
def test_same_operations_strengths_and_signs(policy):
    reference, strengths = POLICIES[policy]
    space = reference()._AUGMENTATION_SPACE
    assert {NAMES[name] for name in augment.OPERATIONS} == set(space)
    for name, table in strengths.items():
        make, signed = space[NAMES[name]]
        assert (name in augment.SIGNED) == signed
        expected = make(31, HEIGHT, WIDTH)
        if expected is not None:
            np.testing.assert_allclose(table, expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_every_strength_gives_torchvisions_image(policy, name, rng):
    reference, strengths = POLICIES[policy]
    values = np.unique(strengths[name])
    if name in augment.SIGNED:
        values = np.concatenate([values, -values])
    if name in ("shear_x", "shear_y", "rotate"):
        # Whole rows of a round shear fall halfway between pixels, where the last bit decides.
        values *= rng.uniform(0.9, 1, len(values))

    pixels = rng.integers(20, 240, (HEIGHT, WIDTH, 3))
    # Every second threshold of Solarize is a multiple of 17, where float32 decides by its last bit.
    pixels += pixels % 17 == 0
    image = jnp.asarray(pixels, jnp.float32) / 255
    operation = jax.jit(jax.vmap(augment.OPERATIONS[name], in_axes=(None, 0)))
    results = np.asarray(operation(image, jnp.asarray(values, jnp.float32)))

    as_bytes = torch.tensor(pixels, dtype=torch.uint8).permute(2, 0, 1)
    as_floats = torch.tensor(np.asarray(image)).permute(2, 0, 1)
    interpolation = v2.InterpolationMode.NEAREST
    for value, result in zip(values, results, strict=True):
        arguments = NAMES[name], float(value), interpolation, {torch.Tensor: None}
        expected = reference()._apply_image_or_video_transform(as_bytes, *arguments)
        levels = np.abs(255 * result - expected.permute(1, 2, 0).numpy())
        if name in GEOMETRIC:
            assert (levels > 1e-3).any(-1).sum() <= 2, value
        elif name in ("identity", "posterize", "solarize", "equalize"):
            assert levels.max() < 1e-3, value
        else:
            # The uint8 kernels round down, and round what they blend with; the float ones do not.
            bound = {"color": 2, "contrast": 2, "sharpness": 1.5}.get(name, 1)
            assert levels.max() < bound + 1e-3, value
            exact = reference()._apply_image_or_video_transform(as_floats, *arguments)
            np.testing.assert_allclose(result, exact.permute(1, 2, 0), rtol=0, atol=1e-6)


def test_cutmix_leaves_the_share_that_timm_leaves(rng):
    key, count, size = jax.random.key(int(rng.integers(2**31))), 4000, (9, 14)
    images, targets = jnp.zeros((2, *size, 3)), jnp.eye(2)

    def share(key):
        mixed = augment.mixup_or_cutmix(key, images, targets, mixup_alpha=0.0, cutmix_alpha=1.0)
        return mixed[1][0, 0]

    shares = np.sort(jax.jit(jax.vmap(share))(jax.random.split(key, count)))
    references = np.sort([cutmix_bbox_and_lam(size, rng.beta(1, 1))[1] for _ in range(count)])
    # Kolmogorov and Smirnov's distance of two samples: above 0.044 once in a thousand.
    places = np.union1d(shares, references) + 1e-6
    distance = np.abs(np.searchsorted(shares, places) - np.searchsorted(references, places)).max()
    assert distance / count < 0.05
