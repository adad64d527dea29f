import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.models import convnext, efficientnet, regnet, resnet
from vision_jax.models.families import build_model
from vision_jax.models.unet import UNet, grow, variant

CNNS = [name for module in (resnet, regnet, efficientnet, convnext) for name in module.VARIANTS]


@pytest.mark.parametrize("size", [(6, 10), (7, 9), (3, 5), (4, 11)])
def test_maps_grow_by_the_nearest_pixel(rng, size):
    x = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, (3, 5), strict=True))
    expected = x[:, rows[:, None], columns[None]]
    np.testing.assert_array_equal(grow(jnp.asarray(x), size), expected)


@pytest.mark.parametrize("size", [(32, 48), (37, 51), (5, 9)])
def test_logits_are_of_the_images_own_size(size):
    arguments = (("widths", (4, 6, 8)),)
    model = UNet(3, "plain", arguments, decoder_widths=(6, 4))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    outputs = jax.eval_shape(model.apply, variables, jnp.zeros((2, *size, 3)))
    assert outputs["logits"].shape == (2, *size, 3)


@pytest.mark.long(but=("mobilenetv3_small_100",))
@pytest.mark.parametrize("encoder", CNNS)
def test_every_cnn_of_the_zoo_is_an_encoder(encoder):
    """Logits of the image's own odd size."""
    model = build_model("unet", num_classes=2, **variant(f"unet_{encoder}"))
    images = jnp.zeros((1, 70, 97, 3))
    outputs, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert outputs["logits"].shape == (1, 70, 97, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "swin"}, "'swin' is none of"),
        ({"encoder_arguments": 3}, "encoder_arguments 3"),
        ({"encoder_arguments": ("widths", (4, 8))}, "give .*name, value"),
        ({"encoder_arguments": ((["a"], 1),)}, "give .*name, value"),
        ({"encoder_arguments": (("width", (4, 8)),)}, "takes no 'width': did you mean"),
        ({"encoder_arguments": (("mean", (0.0,) * 3),)}, "takes no 'mean'"),
        ({"encoder_arguments": (("widths", "48"),)}, "widths '48' is no such list"),
        ({"encoder_arguments": (("widths", (4, 10**9)),)}, "is not from 0 to"),
        ({"encoder_arguments": (("widths", (4,) * 1000),)}, "more than 512"),
        ({"encoder": "resnet", "encoder_arguments": ()}, "depths"),
        ({"decoder_widths": (4, 4)}, "halves the grid 1 times"),
    ],
    ids=str,
)
def test_sizes_that_make_no_model_are_refused(arguments, message):
    given = {"encoder": "plain", "encoder_arguments": (("widths", (4, 8)),), "decoder_widths": (4,)}

    def build():
        model = build_model("unet", num_classes=2, **given | arguments)
        return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))

    with pytest.raises(UserError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
