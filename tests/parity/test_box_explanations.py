"""Maps of boxes in float64: a DETR's against the paper's equations over transformers' attention.

And a RetinaNet's against pytorch-grad-cam 1.5.7 at the level of torchvision's pyramid that the box
comes from.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_grad_cam
import torch
import torchvision_detectors as shared
import transformers
from test_dense import reference as torchvisions

import vision_jax
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.reference_dense import outputs as raw_outputs
from vision_jax.certify.references import make_reference
from vision_jax.errors import UserError
from vision_jax.explain.boxes import box_relevance
from vision_jax.explain.detections import Boxes, box_logit
from vision_jax.explain.forward import Forward
from vision_jax.explain.methods import METHODS
from vision_jax.models.families import build_model
from vision_jax.ops.resize import resize_bilinear

SIZE = (70, 100)  # a grid of 3 x 4
SMALL = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 5,
    "num_labels": 3,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage4"],
}


def relevance_of(found, image, query):
    """The paper's algorithm for one image, in numpy."""

    def moved(attention):
        product = (attention * attention.grad)[image].detach().numpy()
        return np.maximum(product, 0).mean(0)

    def normalized(matrix):
        beyond = matrix - np.eye(len(matrix))
        total = beyond.sum(-1, keepdims=True)
        return np.divide(beyond, total, where=total > 0, out=np.zeros_like(beyond)) + np.eye(
            len(matrix)
        )

    cells = np.eye(found.encoder_attentions[0].shape[-1])
    for attention in found.encoder_attentions:
        cells = cells + moved(attention) @ cells
    among = np.eye(SMALL["num_queries"])
    of_cells = np.zeros((len(among), len(cells)))
    for own, cross in zip(found.decoder_attentions, found.cross_attentions, strict=True):
        own = moved(own)
        of_cells = of_cells + own @ of_cells
        among = among + own @ among
        of_cells = of_cells + normalized(among).T @ moved(cross) @ normalized(cells)
    return of_cells[query]


def test_box_relevance_equals_the_papers_equations(tmp_path, rng):
    seed = int(rng.integers(1000))
    arguments = {**SMALL, "backbone_config": transformers.ResNetConfig(**RESNET)}
    reference = make_reference("transformers", "DetrForObjectDetection", arguments)
    randomize(reference.module, seed)
    randomize_statistics(reference, SIZE, 3, seed)
    saved = reference.save(tmp_path)
    images = sample_images(2, SIZE, 3, seed + 1)
    queries, labels = rng.integers(0, 5, 2), rng.integers(0, 3, 2)

    with jax.enable_x64(True):
        loaded = vision_jax.load(saved, dtype="float64")
        forward = Forward(loaded.model)
        ours = jax.jit(lambda v, x, q, c: box_relevance(forward, v, x, q, c))(
            loaded.variables, images, jnp.asarray(queries), jnp.asarray(labels)
        )
        logits = forward(loaded.variables, jnp.asarray(images))[0]["logits"][-1]

    model = loaded.model
    pixels = torch.tensor((images - model.mean) / model.std).permute(0, 3, 1, 2)
    module = reference.module.double().eval()
    module.set_attn_implementation("eager")
    found = module(pixels, output_attentions=True)
    layers = (*found.encoder_attentions, *found.decoder_attentions, *found.cross_attentions)
    for attention in layers:
        attention.retain_grad()
    found.logits[torch.arange(2), torch.tensor(queries), torch.tensor(labels)].sum().backward()
    np.testing.assert_allclose(logits, found.logits.detach(), rtol=0, atol=1e-9)
    for image in range(2):
        expected = relevance_of(found, image, queries[image]).reshape(3, 4)
        assert expected.max() > 0
        np.testing.assert_allclose(ours[image], expected, rtol=0, atol=1e-8 * expected.max())


def test_other_detectors_are_told_what_to_take():
    loaded = vision_jax.load("embedded:nanodet_coco")
    with pytest.raises(UserError, match="a nanodet has no queries that attend to a map"):
        box_relevance(
            Forward(loaded.model),
            loaded.variables,
            jnp.zeros((1, 64, 64, 3)),
            jnp.zeros(1, jnp.int32),
            jnp.zeros(1, jnp.int32),
        )


class Logits(torch.nn.Module):
    """torchvision's RetinaNet from images in [0, 1] to the logits [B, A, C] of all anchors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        mean, std = (
            torch.tensor(values, dtype=x.dtype).reshape(1, 3, 1, 1)
            for values in (self.module.transform.image_mean, self.module.transform.image_std)
        )
        return raw_outputs(self.module, (x - mean) / std).logits


@pytest.fixture(scope="module")
def retinanet():
    """(torchvision's in float64, our model, its variables)."""
    module = torchvisions("retinanet_resnet50_fpn")
    arguments, flat = shared.imported(module)
    with jax.enable_x64(True):
        model = build_model("retinanet", **arguments, dtype=jnp.float64)
        yield Logits(module.double()), model, shared.variables_of(flat, "float64")
    module.float()


@pytest.mark.parametrize("level", [0, 1, 2], ids=["P3", "P4", "P5"])
@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("grad_cam", pytorch_grad_cam.GradCAM),
        ("grad_cam_plus_plus", pytorch_grad_cam.GradCAMPlusPlus),
        ("layer_cam", pytorch_grad_cam.LayerCAM),
    ],
)
def test_cams_of_an_anchor_equal_pytorch_grad_cams(name, theirs, level, retinanet, rng):
    """At the level that the anchor is on, which nobody names."""
    module, model, variables = retinanet
    height, width = 96, 128
    images = sample_images(2, (height, width), 3, int(rng.integers(1000)))
    counts = [9 * (height // stride) * (width // stride) for stride in (8, 16, 32)]
    places = sum(counts[:level]) + rng.integers(0, counts[level], 2)
    labels = rng.integers(0, model.num_classes, 2)

    cam = theirs(module, [module.module.backbone.fpn.layer_blocks[level]])
    raw = []
    of_image = cam.get_cam_image
    cam.get_cam_image = lambda *given, **named: raw.append(of_image(*given, **named)) or raw[0]
    pixels = torch.tensor(images.transpose(0, 3, 1, 2).copy()).requires_grad_()
    cam(pixels, [partial(one_of, *pair) for pair in zip(places, labels, strict=True)])
    cam.activations_and_grads.release()

    box = Boxes(jnp.asarray(places), jnp.asarray(labels), jnp.ones(2), jnp.zeros((2, 4)))
    target = box_logit("anchors", box, jnp.array([[height, width]] * 2))
    explain = partial(METHODS[name].function, Forward(model), target=target)
    ours = jax.jit(explain)(variables, jnp.asarray(images))
    expected = resize_bilinear(jnp.maximum(raw[0], 0)[..., None], (height // 8, width // 8))
    scale = np.abs(raw[0]).max()
    assert scale > 0
    np.testing.assert_allclose(ours, expected[..., 0], rtol=0, atol=1e-8 * scale)


def one_of(place, label, logits):
    return logits[place, label]
