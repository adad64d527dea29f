"""Self-distillation against lightly 1.6, values, gradients, centers; local crops against timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vision_jax import convert
from vision_jax.certify.random_weights import randomize, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.models.families import build_model
from vision_jax.ops import self_distillation as ops
from vision_jax.trees.paths import flatten, unflatten

losses = pytest.importorskip("lightly.loss")

BARS = {"float32": 1e-5, "float64": 1e-10}
TEMPERATURE = 1 / 16  # exact in float32, in which lightly holds a teacher's also beside float64


def given(array, dtype):
    return torch.from_numpy(array.astype(dtype)).requires_grad_()


def near(ours, theirs, bar):
    theirs = theirs.detach().numpy()
    scale = max(np.abs(theirs).max(), 1e-30)
    assert np.abs(np.asarray(ours) - theirs).max() / scale <= bar


@pytest.mark.parametrize("dtype", BARS)
def test_dino(rng, dtype):
    """Twice, so that the second time a center is taken off that the first one moved."""
    arrays = [rng.normal(size=(2, 4, 16)) for _ in range(2)]
    views = [rng.normal(size=(6, 4, 16)) for _ in range(2)]
    reference = losses.DINOLoss(16, teacher_temp=TEMPERATURE).to(getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        center = jnp.zeros((1, 16), dtype)
        for teacher, student in zip(arrays, views, strict=True):
            inputs = given(student, dtype)
            theirs = reference(list(given(teacher, dtype).detach()), list(inputs))
            theirs.backward()
            logits, student = jnp.asarray(teacher, dtype), jnp.asarray(student, dtype)

            def loss(student, logits=logits, center=center):
                chosen = ops.centered_probabilities(logits, center, TEMPERATURE)
                return ops.dino_losses(student, chosen, 0.1).mean()

            value, gradient = jax.value_and_grad(loss)(student)
            near(value, theirs, BARS[dtype])
            near(gradient, inputs.grad, BARS[dtype])
            rows = logits.reshape(-1, 16)
            center = ops.update_center(center, rows, jnp.ones(len(rows), dtype), 0.9)
            near(center, reference.center.reshape(1, 16), BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
def test_masked_patches(rng, dtype):
    counts = (4, 1, 2)  # whose inverses are exact in float32, in which lightly weighs
    masked = np.arange(4)[None] < np.array(counts)[:, None]
    teacher, student = (rng.normal(size=(3, 4, 8)) for _ in range(2))
    reference = losses.IBOTPatchLoss(8, teacher_temp=TEMPERATURE, student_temp=0.2)
    reference = reference.to(getattr(torch, dtype))
    inputs = given(student, dtype)
    kept = torch.from_numpy(masked)
    theirs = reference(given(teacher, dtype).detach()[kept], inputs[kept], kept[:, None])
    theirs.backward()
    with jax.enable_x64(dtype == "float64"):
        weights = jnp.asarray(masked, dtype)
        logits = jnp.asarray(teacher, dtype)

        def loss(student):
            chosen = ops.centered_probabilities(logits, jnp.zeros((1, 8), dtype), TEMPERATURE)
            return ops.masked_patch_losses(student, chosen, weights, 0.2).mean()

        value, gradient = jax.value_and_grad(loss)(jnp.asarray(student, dtype))
        near(value, theirs, BARS[dtype])
        near(gradient, inputs.grad, BARS[dtype])
        center = ops.update_center(
            jnp.zeros((1, 8), dtype), logits.reshape(-1, 8), weights.ravel(), 0.9
        )
        near(center, reference.center.value.reshape(1, 8), BARS[dtype])


@pytest.mark.parametrize("dtype", BARS)
def test_koleo(rng, dtype):
    features = rng.normal(size=(9, 6))
    inputs = given(features, dtype)
    theirs = losses.KoLeoLoss()(inputs)
    theirs.backward()
    with jax.enable_x64(dtype == "float64"):
        loss = jax.value_and_grad(lambda x: ops.koleo_losses(x).mean())
        value, gradient = loss(jnp.asarray(features, dtype))
        near(value, theirs, BARS[dtype])
        near(gradient, inputs.grad, BARS[dtype])


@pytest.mark.parametrize("size", [16, 48])
def test_local_crops_take_positions_as_timm_does(size, tmp_path, request):
    """Smaller and larger than the model's own images: timm's dynamic_img_size."""
    given = {"num_classes": 0, "depth": 1, "img_size": 32, "patch_size": 8, "embed_dim": 48}
    reference = make_reference(
        "timm", "vit_tiny_patch16_224", {**given, "dynamic_img_size": True, "num_heads": 4}
    )
    randomize(reference.module, 3)
    reference.save(tmp_path)
    weights = convert.read_weights(str(tmp_path))
    _, arguments = convert.recognize(weights)
    arguments |= {"mean": (0.0,) * 3, "std": (1.0,) * 3, "num_classes": 0}
    heads = {"prototypes": 4, "head_width": 6, "bottleneck": 5}
    model = build_model("dino", **arguments, **heads)
    images = sample_images(2, (size, size), 3, request.config.option.seed)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    flat = flatten(variables["params"])
    vit = {p: x for p, x in flat.items() if not p.startswith(model.added)}
    flat |= convert.import_weights(weights, vit, arguments)
    params = unflatten(variables["params"], flat)
    ours = jax.jit(model.apply)({**variables, "params": params}, jnp.asarray(images, jnp.float32))
    pixels = torch.from_numpy(images.astype(np.float32).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = reference.module.eval().forward_features(pixels)
    near(ours["token"], theirs[:, 0], 1e-5)
    near(ours["patch_tokens"], theirs[:, 1:], 1e-5)
