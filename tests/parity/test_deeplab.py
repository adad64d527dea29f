"""Our DeepLabV3 against torchvision's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.segmentation.deeplabv3 import _deeplabv3_resnet

from vision_jax import convert
from vision_jax.certify.measure import certify_reference, relative_error
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.convert.load import write_safetensors
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.ops.resize import resize_bilinear
from vision_jax.trees.paths import flatten, unflatten


@pytest.mark.parametrize(("auxiliary", "size"), [(True, (97, 70)), (False, (64, 96))])
def test_everything_equals_the_reference_and_goes_back(auxiliary, size):
    given = {"aux_loss": auxiliary, "num_classes": 5}
    reference = make_reference("torchvision", "deeplabv3_resnet50", given)
    randomize(reference.module, 3)
    randomize_statistics(reference, size, 3, 3)
    certificate = certify_reference(reference, size, whole=True)
    print(certificate["worst"])
    assert certificate["pass"], (certificate["reasons"], certificate["errors"])
    assert certificate["family"] == "deeplab"
    assert certificate["parameters_filled"] == certificate["parameters_in_model"]
    assert certificate["tensors_consumed"] == certificate["tensors"] == (370 if auxiliary else 362)
    named = {"stem", "stage_0", "stage_1", "stage_2", "stage_3", "context", "logits"}
    also = {"auxiliary_logits"} if auxiliary else set()
    assert set(certificate["errors"]["float64"]) == named | also


def small():
    """torchvision's module with few layers, in float64."""
    body = ResNet(Bottleneck, [1, 2, 2, 2], replace_stride_with_dilation=[False, True, True])
    module = _deeplabv3_resnet(body, 4, aux=True).eval()
    randomize(module, 5)
    for norm in module.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 1.5)
    return module.double()


def imported(module, folder):
    tensors = {name: value.float().numpy() for name, value in module.state_dict().items()}
    tensors = {
        name: x.astype(np.int64) if name.endswith("tracked") else x for name, x in tensors.items()
    }
    write_safetensors(folder / "small.safetensors", tensors)
    weights = convert.read_weights(str(folder / "small.safetensors"))
    family, arguments = convert.recognize(weights)
    assert family == "deeplab"
    model = build_model(family, **arguments, dtype=jnp.float64)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    target = flatten(like["params"]) | flatten(like["batch_stats"])
    flat = convert.import_weights(weights, target, arguments)
    wide = {path: jnp.asarray(x, x.dtype if path.endswith("count") else jnp.float64)
            for path, x in flat.items()}  # fmt: skip
    return model, {
        part: unflatten(tree, {path: wide[path] for path in flatten(tree)})
        for part, tree in like.items()
    }


def test_its_outputs_losses_and_gradients_are_torchvisions(tmp_path):
    """At the image's own size, as torchvision gives them, and in training as its script has it."""
    module, size = small(), (42, 305)  # 39 cells, which the rate of 36 reaches across
    images = sample_images(2, size, 3, 5)
    labels = np.random.default_rng(5).integers(0, 4, (2, *size))
    labels[:, :9] = 255
    with jax.enable_x64(True):
        model, variables = imported(module, tmp_path)
        mean, std = (np.asarray(x) for x in (model.mean, model.std))
        given = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            theirs = module(given)
        ours = jax.jit(model.apply)(variables, images)
        for name, other in (("logits", "out"), ("auxiliary_logits", "aux")):
            enlarged = resize_bilinear(ours[name], size).transpose(0, 3, 1, 2)
            assert relative_error(np.asarray(enlarged), theirs[other].numpy()) <= 1e-12, name

        module.train()
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.eval()
        said = module(given)
        target = torch.from_numpy(labels)
        expected = functional.cross_entropy(said["out"], target, ignore_index=255)
        expected = expected + 0.5 * functional.cross_entropy(said["aux"], target, ignore_index=255)
        expected.backward()

        def loss(params):
            outputs, changed = model.apply(
                {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
            )
            kept, total = labels != 255, 0.0
            for name, weight in (("logits", 1.0), ("auxiliary_logits", 0.5)):
                logits = jax.nn.log_softmax(resize_bilinear(outputs[name], size))
                index = np.where(kept, labels, 0)[..., None]
                picked = jnp.take_along_axis(logits, index, -1)[..., 0]
                total = total - weight * (picked * kept).sum() / kept.sum()
            return total, changed["batch_stats"]

        step = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (found, statistics), gradients = step(variables["params"])
        assert abs(float(found) - expected.item()) <= 1e-11 * expected.item()
        gradients = {path: np.asarray(x) for path, x in flatten(gradients).items()}
        running = np.asarray(statistics["aspp_pool"]["bn"]["var"])
    own = dict(module.named_parameters())
    pairs = {
        "backbone/conv1/kernel": "backbone.conv1.weight",
        "backbone/stage_2/block_0/conv2/kernel": "backbone.layer3.0.conv2.weight",
        "backbone/stage_2/block_1/conv2/kernel": "backbone.layer3.1.conv2.weight",
        "backbone/stage_3/block_1/conv2/kernel": "backbone.layer4.1.conv2.weight",
        "aspp_3/conv/kernel": "classifier.0.convs.3.0.weight",
        "aspp_pool/conv/kernel": "classifier.0.convs.4.1.weight",
        "project/bn/scale": "classifier.0.project.1.weight",
        "auxiliary_conv/conv/kernel": "aux_classifier.0.weight",
        "class_head/bias": "classifier.4.bias",
    }
    for path, name in pairs.items():
        expected = own[name].grad.numpy()
        expected = expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected
        assert relative_error(gradients[path], expected) <= 1e-9, path
    theirs = module.classifier[0].convs[4][2].running_var.numpy()
    assert relative_error(running, theirs) <= 1e-10


def test_other_backbones_are_refused():
    for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"):
        with torch.device("meta"):
            module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        with pytest.raises(UserError, match=r"no architecture that is known here|are beside them"):
            convert.tables.find_table(shapes)


def test_counts_are_torchvisions():
    for name, count in (("deeplabv3_resnet50", 42_004_074), ("deeplabv3_resnet101", 60_996_202)):
        arguments = build_model("deeplab", num_classes=21, **_sizes(name), auxiliary_head=True)
        shapes = jax.eval_shape(arguments.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


def _sizes(name):
    from vision_jax.models.deeplab import VARIANTS

    return VARIANTS[name]
