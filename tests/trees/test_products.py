"""On GPUs and TPUs a model's program is plain lax's: the forms of a CPU stay on CPUs."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from vision_jax.models import families
from vision_jax.trees import lora, products

MODELS = {
    "vit": {"width": 16, "depth": 1, "num_heads": 2, "mlp_width": 32, "patch_size": 8},
    "resnet": {"depths": (1, 1), "widths": (8, 16), "stem_width": 8, "block": "bottleneck"},
    "swin": {"width": 8, "depths": (1, 2), "num_heads": (2, 2), "windows": ((4, 4), (4, 4))},
}
SIDE = 32


def plain_dense(x):
    return lambda x, kernel: lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def plain_convolution(window, strides, padding, groups=1, dilation=1):
    """A convolution whose windows tile the image is a dot on every platform."""
    if groups == 1 and strides == window and not any(map(any, padding)):
        return products._tiled

    def convolve(x, kernel):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return convolve


def plain_attend(q, k, v, *, bias=None, scale=None, tap=None):
    assert tap is None  # nobody asks what is inside
    bias = bias[None] if bias is not None and bias.ndim == 3 else bias
    return jax.nn.dot_product_attention(q, k, v, bias, scale=scale, implementation="xla")


def lowered(name: str, platform: str) -> str:
    """StableHLO of the gradient of a model: of its adapters too, if it is a ViT."""
    sizes = {"num_classes": 3, "in_channels": 3, **MODELS[name]}
    if "image_size" in families.FAMILIES[name].arguments:
        sizes["image_size"] = (SIDE, SIDE)
    model = families.build_model(name, **sizes)
    images = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    params = variables.pop("params")
    if name == "vit":
        rules = (r"block_\d+/mlp/fc\d/kernel",)
        params = jax.eval_shape(
            lambda p: lora.attach(p, rules, key=jax.random.key(0), rank=2, alpha=4), params
        )
    apply = families.make_apply(model)

    def loss(params, images):
        state = variables.get("batch_stats", {})
        state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), state)
        outputs, _ = apply(params, state, images, train=True, keys={})
        return outputs["logits"].sum()

    traced = jax.jit(jax.grad(loss, (0, 1))).trace(params, images)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.long
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", MODELS)
def test_a_program_for_an_accelerator_is_plain_lax(name, platform, monkeypatch):
    if (name, platform) == ("resnet", "cuda"):  # else the comparison would see nothing
        ours = lowered(name, platform)
    backend = {"cuda": "gpu"}.get(platform, platform)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    found = lowered(name, platform)
    if (name, platform) == ("resnet", "cuda"):
        assert ours != found
    monkeypatch.setattr(products, "dense", plain_dense)
    monkeypatch.setattr(products, "convolution", plain_convolution)
    for module in ("vit", "swin"):
        monkeypatch.setattr(f"vision_jax.models.{module}.attend", plain_attend)
    assert found == lowered(name, platform)


@pytest.mark.long
def test_the_kernel_of_a_convolution_in_bfloat16_has_a_gradient(rng):
    """With autodiff's sum in float32, of images that are exact in bfloat16."""
    images = jnp.asarray(rng.integers(-8, 8, (2, 9, 9, 16)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 16, 4)), jnp.float32)
    product = products.convolution((3, 3), (2, 2), ((1, 1), (1, 1)))

    def loss(kernel, dtype):
        return product(images.astype(dtype), kernel).astype(jnp.float32).sum()

    half, single = (jax.grad(loss)(kernel, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.float32
    assert jnp.array_equal(half, single)


@pytest.mark.parametrize("outputs", [1, 8, 64, 65])
def test_a_narrow_kernel_has_the_same_gradients(outputs, rng):
    with jax.enable_x64(True):
        x, kernel = rng.normal(size=(3, 5, 70)), rng.normal(size=(70, outputs))

        def derivatives(product):
            loss = lambda x, kernel: jnp.sin(product(x, kernel)).sum()  # noqa: E731
            return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)

        found, wanted = map(derivatives, (products._flat_dot, products._plain_dot))
        for got, expected in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            assert jnp.abs(got - expected).max() <= 1e-13 * jnp.abs(expected).max()
