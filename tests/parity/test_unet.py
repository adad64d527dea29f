"""U-Net beside a PyTorch one that is written here, and beside segmentation_models_pytorch."""

import jax
import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from vision_jax.commands.convert import main as convert_main
from vision_jax.convert import (
    arguments_of,
    export_weights,
    import_weights,
    read_weights,
    recognize,
)
from vision_jax.convert.read import Weights
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.trees.paths import flatten, unflatten

WIDTHS = (24, 16, 16, 12, 8)


def conv_norm(inputs, outputs):
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv1, self.conv2 = conv_norm(inputs, outputs), conv_norm(outputs, outputs)


class Reference(nn.Module):
    """The paper's ups and skips on torchvision's ResNet-18, names as in smp's files."""

    def __init__(self, classes):
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        del self.encoder.fc
        skips = (256, 128, 64, 64, 0)
        inputs = (512, *WIDTHS[:-1])
        self.decoder = nn.Module()
        self.decoder.blocks = nn.ModuleList(
            Block(a + b, c) for a, b, c in zip(inputs, skips, WIDTHS, strict=True)
        )
        self.segmentation_head = nn.Sequential(nn.Conv2d(WIDTHS[-1], classes, 3, padding=1))

    def forward(self, x):
        net, size = self.encoder, x.shape[2:]
        maps = [net.relu(net.bn1(net.conv1(x)))]
        y = net.maxpool(maps[0])
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            y = layer(y)
            maps.append(y)
        y = maps.pop()
        for block in self.decoder.blocks:
            skip = maps.pop() if maps else None
            y = F.interpolate(y, size=size if skip is None else skip.shape[2:], mode="nearest")
            y = y if skip is None else torch.cat([y, skip], 1)
            y = block.conv2(block.conv1(y))
        return self.segmentation_head(y)


def randomize(model, rng):
    """Every parameter and statistic, such that activations keep their size."""
    for name, tensor in model.state_dict().items():
        noise = torch.from_numpy(np.asarray(rng.normal(size=tuple(tensor.shape))))
        if name.endswith("num_batches_tracked"):
            tensor.fill_(7)
        elif tensor.ndim == 4:
            tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
        elif name.endswith("running_var") or (name.endswith("weight") and tensor.ndim == 1):
            tensor.copy_(1 + 0.1 * noise.abs())
        else:
            tensor.copy_(0.1 * noise)


def ours(reference, images):
    """Logits of our model with the reference's weights, NHWC."""
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    weights = Weights(tensors, {}, None, "reference")
    family, arguments = recognize(weights)
    assert family == "unet"
    dtype = images.dtype
    model = build_model(family, **arguments | {"mean": (0.0,) * 3, "std": (1.0,) * 3}, dtype=dtype)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    target = {path: leaf for tree in variables.values() for path, leaf in flatten(tree).items()}
    arrays = import_weights(weights, target, arguments)
    arrays = {
        path: np.asarray(x, x.dtype if x.dtype.kind == "i" else dtype) for path, x in arrays.items()
    }
    filled = {
        name: unflatten(tree, {path: arrays[path] for path in flatten(tree)})
        for name, tree in variables.items()
    }
    return np.asarray(jax.jit(model.apply)(filled, images)["logits"])


def test_what_is_written_is_what_was_read(rng):
    """Names, shapes and numbers of a state_dict, bit by bit."""
    reference = Reference(3)
    randomize(reference, rng)
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    weights = Weights(tensors, {}, None, "reference")
    family, arguments = recognize(weights)
    model = build_model(family, **arguments)
    images = np.zeros((1, 64, 64, 3), np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    target = {path: leaf for tree in variables.values() for path, leaf in flatten(tree).items()}
    arrays = import_weights(weights, target, arguments)
    written, _ = export_weights(arrays, family, {**arguments_of(model)}, to="smp")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def check_logits(reference, rng, size):
    """Ours in float32 and float64 beside the reference's in float64, whose rounding is none."""
    reference = reference.double().eval()
    randomize(reference, rng)
    images = rng.random((2, *size, 3))
    with torch.no_grad():
        theirs = reference(torch.from_numpy(images).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    for dtype, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        with jax.enable_x64(dtype == np.float64):
            found = ours(reference, images.astype(dtype))
        assert found.dtype == dtype
        assert np.abs(found - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize("size", [(64, 96), (75, 101)])
def test_logits_of_a_resnet(rng, size):
    check_logits(Reference(5), rng, size)


def test_logits_of_segmentation_models_pytorch(rng):
    smp = pytest.importorskip("segmentation_models_pytorch")
    check_logits(smp.Unet("resnet18", encoder_weights=None, classes=4), rng, (64, 96))


def test_smp_loads_the_folder_that_is_written_for_it(rng, tmp_path):
    """By its own from_pretrained, and what it saves is read; another decoder is refused."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    reference = smp.Unet("resnet18", encoder_weights=None, classes=4).eval()
    randomize(reference, rng)
    reference.save_pretrained(tmp_path / "theirs")
    command = [str(tmp_path / "theirs"), f"--out={tmp_path / 'ours'}", "--to=smp"]
    assert convert_main(command) == 0
    again = smp.from_pretrained(tmp_path / "ours").eval()
    assert again.config | {"decoder_channels": (256, 128, 64, 32, 16)} == {
        **reference.config,
        "_model_class": "Unet",
    }
    images = torch.from_numpy(rng.random((1, 3, 64, 96), np.float32))
    with torch.no_grad():
        np.testing.assert_array_equal(again(images), reference(images))
    odd = smp.Unet("resnet18", encoder_weights=None, decoder_interpolation="bilinear")
    odd.save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"decoder_interpolation 'bilinear' .*'nearest' alone"):
        recognize(read_weights(str(tmp_path / "odd")))
