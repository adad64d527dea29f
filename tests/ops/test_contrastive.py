"""The sigmoid loss of pairs around the ring of devices, against the whole matrix."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vision_jax.ops import contrastive

MESHES = {"one": (1, 1), "data": (8, 1), "both": (2, 4)}


def mesh_of(data, fsdp):
    devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(devices, ("data", "fsdp"))


def of_whole_matrix(image, text, scale, bias):
    """Algorithm 1 of the paper, of each image."""
    logits = image @ text.T * scale + bias
    labels = 2 * np.eye(len(image)) - 1
    return np.log1p(np.exp(-labels * logits)).sum(1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("mesh", MESHES)
def test_values_and_gradients(rng, dtype, mesh):
    image, text = (rng.normal(size=(16, 5)) for _ in range(2))
    weights = rng.normal(size=16)
    given = (image, text, np.array(2.3), np.array(-1.7))
    tolerance = {"float32": 1e-5, "float64": 1e-12}[dtype]
    with jax.enable_x64(dtype == "float64"):

        def weighted(*arguments):
            losses = contrastive.sigmoid_losses(*arguments, mesh_of(*MESHES[mesh]))
            return (losses * jnp.asarray(weights, dtype)).sum(), losses

        program = jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2, 3), has_aux=True))
        (_, losses), gradients = program(*(jnp.asarray(x, dtype) for x in given))
        assert losses.dtype == dtype
    expected = of_whole_matrix(*given)
    np.testing.assert_allclose(losses, expected, rtol=tolerance)
    for number, gradient in enumerate(gradients):
        # By the difference quotient of numpy's loss, along one direction.
        direction = rng.normal(size=np.shape(given[number]))
        step, moved = 1e-6, []
        for sign in (1, -1):
            changed = list(given)
            changed[number] = given[number] + sign * step * direction
            moved.append((of_whole_matrix(*changed) * weights).sum())
        slope = (moved[0] - moved[1]) / (2 * step)
        found = float((np.asarray(gradient, np.float64) * direction).sum())
        np.testing.assert_allclose(found, slope, rtol=max(tolerance, 1e-7), atol=1e-4)


def test_one_and_eight_devices_are_the_same(rng):
    image, text = (jnp.asarray(rng.normal(size=(64, 8)), jnp.float32) for _ in range(2))
    found = []
    for name in MESHES:
        mesh = mesh_of(*MESHES[name])

        def loss(image, text, scale, bias, mesh=mesh):
            return contrastive.sigmoid_losses(image, text, scale, bias, mesh).mean()

        program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        found.append(jax.tree.leaves(program(image, text, jnp.float32(3), jnp.float32(-2))))
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            scale = np.abs(theirs).max()
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * scale)


def test_no_device_holds_the_matrix():
    """The temporary memory of a device, by the compiler, with the backward pass."""
    count, width = 2048, 16
    megabytes = {}
    for devices in (1, 2, 4, 8):
        mesh = mesh_of(devices, 1)
        split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        features = jax.ShapeDtypeStruct((count, width), jnp.float32, sharding=split)
        scalar = jax.ShapeDtypeStruct((), jnp.float32)

        def loss(image, text, scale, bias, mesh=mesh):
            return contrastive.sigmoid_losses(image, text, scale, bias, mesh).mean()

        program = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        compiled = program.lower(features, features, scalar, scalar).compile()
        megabytes[devices] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    for devices, found in megabytes.items():
        assert found <= 1.02 * megabytes[1] / devices, megabytes
    rows = count // 8 * count * 4 / 1e6  # what a device's images have with all texts
    assert megabytes[8] < rows, megabytes


def test_the_loss_of_one_logit_for_all_is_the_least_of_them():
    count = 12
    image = text = jnp.ones((count, 3))
    logits = np.linspace(-6, 2, 4001)
    losses = np.log1p(np.exp(-logits)) + (count - 1) * np.log1p(np.exp(logits))
    assert abs(losses.min() - contrastive.constant_loss(count)) < 1e-5
    best = math.log(1 / (count - 1))
    found = contrastive.sigmoid_losses(
        image, text, jnp.float32(0), jnp.float32(best), mesh_of(1, 1)
    )
    np.testing.assert_allclose(found, contrastive.constant_loss(count), rtol=1e-6)
    assert contrastive.constant_loss(1) == 0
