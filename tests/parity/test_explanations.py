"""Our maps against captum 0.9.0 and pytorch-grad-cam 1.5.7, in float64, on many families.

Where the libraries have no such method (rollout, relevance, RISE) the paper's formula is written
out over what timm's own modules say.
"""

import dataclasses

import captum.attr
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pytorch_grad_cam
import torch
from pytorch_grad_cam.metrics.road import NoisyLinearImputer, neighbors_weights
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from scipy.sparse import csc_matrix
from scipy.sparse.linalg import spsolve

import vision_jax
from vision_jax.attacks.examples import keys_of
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.explain import measures
from vision_jax.explain.attention import attention_relevance, attention_rollout
from vision_jax.explain.forward import Forward, class_logit, class_probability
from vision_jax.explain.gradients import integrated_gradients, noise_of, saliency, smooth_grad
from vision_jax.explain.methods import METHODS
from vision_jax.explain.perturbations import (
    ablate_segments,
    coarse_masks,
    grid_segments,
    occlusion,
    rise,
)

LIMIT = 1e-8  # of the largest value
CLASSES = 7
SIZE = (32, 48)


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model of a library.

    Attributes:
      source, build, arguments: of certify.references.make_reference.
      layer: (torch's module, its output -> f[B, D, h, w]) of what Forward.map_taps names.
    """

    source: str
    build: str
    arguments: dict
    layer: str
    size: tuple[int, int] = SIZE
    to_map: str = "channels first"


def _timm(build, layer, to_map="channels first", size=SIZE, **arguments):
    return Case("timm", build, {"num_classes": CLASSES, **arguments}, layer, size, to_map)


VIT = {"img_size": SIZE, "embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8}
CASES = {
    "resnet": _timm("resnet18", "layer4", layers=(1, 1, 1, 1), channels=(8, 12, 16, 16)),
    "regnet": Case(
        "transformers",
        "RegNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 8,
         "num_labels": CLASSES},
        "regnet.encoder.stages.1",
    ),
    "convnext": _timm("convnext_atto", "stages.3", depths=(1, 1, 1, 1), dims=(8, 12, 16, 16)),
    "swin": _timm(
        "swin_tiny_patch4_window7_224", "layers.1", "channels last",
        img_size=SIZE, embed_dim=24, depths=(2, 1), num_heads=(2, 3), window_size=4,
    ),
    "mit": Case(
        "transformers",
        "SegformerForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2],
         "sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
         "num_encoder_blocks": 2, "num_labels": CLASSES},
        "segformer.stages.1.layer_norm",
        to_map="0",
    ),
    "vit": _timm("vit_tiny_patch16_224", "blocks.1.norm1", "1", **VIT),
    "vit, mean": _timm("vit_tiny_patch16_224", "blocks.1.norm1", "1", **VIT, global_pool="avg"),
    "vit, registers": _timm(
        "vit_tiny_patch16_224", "blocks.1.norm1", "4", **VIT, reg_tokens=3
    ),
    "deit distilled": _timm("deit_tiny_distilled_patch16_224", "blocks.1.norm1", "2", **VIT),
    "vit, attention pooling": _timm(
        "vit_base_patch16_siglip_224", "blocks.1.norm1", "0", **VIT
    ),
    "beit": _timm("beit_base_patch16_224", "blocks.1.norm1", "1", **VIT),
}  # fmt: skip
TOKENS = [name for name in CASES if name not in ("resnet", "regnet", "convnext", "swin", "mit")]


class OfPixels(torch.nn.Module):
    """A reference that takes images in [0, 1] and gives logits."""

    def __init__(self, module, mean, std):
        super().__init__()
        self.module = module
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(
                name, torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)
            )

    def forward(self, x):
        outputs = self.module((x - self.mean) / self.std)
        return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


@dataclasses.dataclass
class Pair:
    """The same model twice, and what is explained of it."""

    case: Case
    theirs: torch.nn.Module
    forward: Forward
    variables: dict
    images: np.ndarray
    labels: np.ndarray
    keys: jax.Array

    @property
    def pixels(self):
        return torch.tensor(self.images.transpose(0, 3, 1, 2).copy())

    @property
    def classes(self):
        return torch.tensor(self.labels)

    def ours(self, method, target=class_logit, **options):
        """One compiled call."""

        def run(variables, images, target, keys):
            return method(self.forward, variables, images, target, keys, **options)

        goal = target(jnp.asarray(self.labels))
        return np.asarray(jax.jit(run)(self.variables, self.images, goal, self.keys))


@pytest.fixture(params=CASES)
def pair(request, tmp_path, rng):
    return make_pair(request.param, tmp_path, rng)


def make_pair(name, tmp_path, rng):
    case = CASES[name]
    seed = int(rng.integers(1000))
    reference = make_reference(case.source, case.build, case.arguments)
    randomize(reference.module, seed)
    randomize_statistics(reference, case.size, 3, seed)
    saved = reference.save(tmp_path)
    loaded = vision_jax.load(saved, image_size=case.size, dtype="float64")
    images = sample_images(2, case.size, 3, seed + 1)
    model = loaded.model
    theirs = OfPixels(reference.module.double().eval(), model.mean, model.std)
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    labels = rng.integers(0, CLASSES, 2)
    keys = keys_of(jax.random.key(seed), jnp.arange(2))
    return Pair(case, theirs, Forward(model), loaded.variables, images, labels, keys)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """float64 throughout: captum rounds its quadrature's weights and what it ablates to float32."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    with jax.enable_x64(True):
        yield


def assert_equal(ours, theirs, scale=None):
    """Within LIMIT of the largest value of theirs, or of `scale`, which is not zero."""
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    largest = np.abs(theirs if scale is None else scale).max()
    assert largest > 0
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=LIMIT * largest)


def last(x):
    """f[B, H, W, C] of torch's [B, C, H, W]."""
    return x.detach().permute(0, 2, 3, 1)


def test_the_logits_are_the_same(pair):
    outputs, _ = pair.forward(pair.variables, jnp.asarray(pair.images))
    with torch.no_grad():
        assert_equal(np.asarray(outputs["logits"]), pair.theirs(pair.pixels))


def test_gradients_equal_captums(pair, monkeypatch):
    theirs = captum.attr.Saliency(pair.theirs).attribute(
        pair.pixels.requires_grad_(), target=pair.classes, abs=False
    )
    assert_equal(pair.ours(saliency), last(theirs))

    samples, noise = 3, 0.2
    drawn = [np.asarray(noise_of(pair.keys, sample, pair.images)) for sample in range(samples)]
    stacked = np.stack(drawn, axis=1).reshape(-1, *pair.images.shape[1:])  # image by image
    stacked = torch.tensor(noise * stacked.transpose(0, 3, 1, 2).copy())
    monkeypatch.setattr(torch, "normal", lambda *given, **named: stacked)
    tunnel = captum.attr.NoiseTunnel(captum.attr.Saliency(pair.theirs))
    theirs = tunnel.attribute(
        pair.pixels, nt_type="smoothgrad", nt_samples=samples, stdevs=noise,
        target=pair.classes, abs=False,
    )  # fmt: skip
    assert_equal(pair.ours(smooth_grad, samples=samples, noise=noise), last(theirs))


def test_integrated_gradients_equal_captums(pair, rng):
    baseline = rng.random((1, 1, 1, 3))
    torch.set_default_dtype(torch.float64)  # else the weights are float32 before they are widened
    try:
        theirs, delta = captum.attr.IntegratedGradients(pair.theirs).attribute(
            pair.pixels,
            torch.tensor(baseline.transpose(0, 3, 1, 2)).expand(2, 3, *pair.case.size),
            target=pair.classes,
            n_steps=9,
            return_convergence_delta=True,
        )
    finally:
        torch.set_default_dtype(torch.float32)
    ours = pair.ours(integrated_gradients, nodes=9, baseline=baseline)
    assert_equal(ours, last(theirs))

    base = np.broadcast_to(baseline, pair.images.shape)
    target = class_logit(jnp.asarray(pair.labels))
    scores = [
        target(pair.forward(pair.variables, jnp.asarray(images))[0])
        for images in (pair.images, base)
    ]
    error = measures.completeness(jnp.asarray(ours), *scores)
    np.testing.assert_allclose(error, delta.detach().numpy(), rtol=0, atol=1e-8)


def test_occlusion_and_ablation_equal_captums(pair, rng):
    window, stride = 11, 7  # the last ones stand out of the image
    theirs = captum.attr.Occlusion(pair.theirs).attribute(
        pair.pixels, (3, window, window), (3, stride, stride), 0.3, target=pair.classes
    )
    ours = pair.ours(occlusion, window=window, stride=stride, baseline=0.3)
    assert_equal(ours, theirs[:, 0])

    segments = rng.integers(0, 6, (2, *pair.case.size))
    segments[:, 0, :6] = np.arange(6)  # all of them are there
    theirs = captum.attr.FeatureAblation(pair.theirs).attribute(
        pair.pixels, 0.1, target=pair.classes, feature_mask=torch.tensor(segments)[:, None]
    )

    def ablate(forward, variables, images, target, keys):
        given = jnp.asarray(segments)
        return ablate_segments(forward, variables, images, target, given, count=6, baseline=0.1)

    assert_equal(pair.ours(ablate), theirs[:, 0])

    grid = torch.tensor(grid_segments(pair.case.size, 5))[None, None].long()
    theirs = captum.attr.FeatureAblation(pair.theirs).attribute(
        pair.pixels, target=pair.classes, feature_mask=grid.expand(2, 1, -1, -1)
    )
    assert_equal(pair.ours(METHODS["feature_ablation"].function, cells=5), theirs[:, 0])


def to_map(case, grid):
    """Of a module's output f[B, D, h, w]."""

    def reshape(x):
        if case.to_map == "channels first":
            return x
        if case.to_map == "channels last":
            return x.permute(0, 3, 1, 2)
        prefix = int(case.to_map)
        return x[:, prefix:].transpose(1, 2).reshape(len(x), -1, *grid)

    return reshape


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("grad_cam", pytorch_grad_cam.GradCAM),
        ("grad_cam_plus_plus", pytorch_grad_cam.GradCAMPlusPlus),
        ("layer_cam", pytorch_grad_cam.LayerCAM),
    ],
)
def test_cams_equal_pytorch_grad_cams(pair, name, theirs):
    layer = pair.theirs.module.get_submodule(pair.case.layer)
    cam = theirs(
        pair.theirs, [layer], reshape_transform=to_map(pair.case, pair.forward.grid or (4, 6))
    )
    raw = []
    of_image = cam.get_cam_image
    cam.get_cam_image = lambda *given, **named: raw.append(of_image(*given, **named)) or raw[0]
    cam(pair.pixels.requires_grad_(), [ClassifierOutputTarget(label) for label in pair.labels])
    cam.activations_and_grads.release()
    ours = pair.ours(METHODS[name].function)
    assert_equal(ours, np.maximum(raw[0], 0), scale=raw[0])


@pytest.mark.parametrize("name", ["resnet", "regnet", "convnext"])
def test_grad_cam_equals_captums(name, tmp_path, rng):
    pair = make_pair(name, tmp_path, rng)
    layer = pair.theirs.module.get_submodule(pair.case.layer)
    theirs = captum.attr.LayerGradCam(pair.theirs, layer).attribute(
        pair.pixels.requires_grad_(), target=pair.classes
    )
    ours = pair.ours(METHODS["grad_cam"].function)
    assert_equal(ours, torch.relu(theirs)[:, 0], scale=theirs.detach().numpy())


def attentions_of(pair):
    """(timm's probabilities of each block f[B, K, N, N], of the pooling, their gradients)."""
    kept = []

    def keep(module, given, output):
        output.retain_grad()
        kept.append(output)

    module = pair.theirs.module
    blocks = [block.attn for block in module.blocks]
    pools = [module.attn_pool] if getattr(module, "attn_pool", None) is not None else []
    hooks = []
    for attention in (*blocks, *pools):
        attention.fused_attn = False  # so that the probabilities pass through the dropout
        if not hasattr(attention, "attn_drop"):
            attention.attn_drop = torch.nn.Identity()
        hooks.append(attention.attn_drop.register_forward_hook(keep))
    logits = pair.theirs(pair.pixels)
    logits[torch.arange(2), pair.classes].sum().backward()
    for hook in hooks:
        hook.remove()
    assert len(kept) == len(blocks) + len(pools)
    return [x.detach().numpy() for x in kept], [x.grad.numpy() for x in kept]


@pytest.mark.parametrize("name", [name for name in TOKENS if name != "vit, attention pooling"])
def test_rollout_and_relevance_equal_the_papers_formulas(name, tmp_path, rng):
    pair = make_pair(name, tmp_path, rng)
    attentions, gradients = attentions_of(pair)
    count = attentions[0].shape[-1]
    prefix = int(pair.case.to_map)
    for image in range(2):
        rolled = relevance = np.eye(count)
        for attention, gradient in zip(attentions, gradients, strict=True):
            mean = attention[image].mean(0) + np.eye(count)
            rolled = mean / mean.sum(-1, keepdims=True) @ rolled
            relevance = relevance + (
                np.maximum(attention[image] * gradient[image], 0).mean(0) @ relevance
            )
        for ours, matrix in ((attention_rollout, rolled), (attention_relevance, relevance)):
            if name in ("vit, mean", "beit"):
                row = matrix[prefix:].mean(0)
            else:
                row = matrix[: 2 if name == "deit distilled" else 1].mean(0)
            expected = row[prefix:].reshape(pair.forward.grid)
            assert_equal(pair.ours(ours)[image], expected)


@pytest.mark.parametrize("name", ["vit, mean", "resnet"])
def test_rise_equals_the_papers_formula(name, tmp_path, rng):
    pair = make_pair(name, tmp_path, rng)
    count, cells, keep = 5, 4, 0.4
    height, width = pair.case.size
    total = torch.zeros(2, height, width, dtype=torch.float64)
    for index in range(count):
        masks = np.asarray(coarse_masks(pair.keys, index, jnp.asarray(pair.images), cells, keep))
        masks = torch.tensor(masks)
        with torch.no_grad():
            scores = pair.theirs(pair.pixels * masks[:, None]).softmax(-1)
        total += scores[torch.arange(2), pair.classes][:, None, None] * masks
    ours = pair.ours(rise, class_probability, masks=count, cells=cells, keep=keep)
    assert_equal(ours, total / (count * keep))


def test_rises_masks_are_enlarged_as_torch_does_it(rng):
    """A cell's values, by torch's interpolation, at some shift within a cell."""
    images = jnp.zeros((3, 20, 33, 1), jnp.float64)
    keys = keys_of(jax.random.key(int(rng.integers(1000))), jnp.arange(3))
    masks = np.asarray(coarse_masks(keys, 2, images, 5, 0.5))
    sides = 4, 7
    for mask, key in zip(masks, keys, strict=True):
        grid_key, _ = jax.random.split(jax.random.fold_in(key, 2))
        grid = np.array(jax.random.bernoulli(grid_key, 0.5, (5, 5)), np.float64)
        large = torch.nn.functional.interpolate(
            torch.tensor(grid)[None, None], (6 * 4, 6 * 7), mode="bilinear", align_corners=False
        )[0, 0].numpy()
        differences = [
            np.abs(large[top : top + 20, left : left + 33] - mask).max()
            for top in range(sides[0])
            for left in range(sides[1])
        ]
        assert min(differences) < 1e-12


def test_imputed_pixels_equal_pytorch_grad_cams(rng):
    images = rng.random((2, 13, 17, 3))
    missing = rng.random((2, 13, 17)) < np.array([0.3, 0.9]).reshape(2, 1, 1)
    ours = np.asarray(measures.impute(jnp.asarray(images), jnp.asarray(missing)))
    for image, hole, filled in zip(images, missing, ours, strict=True):
        system, right = NoisyLinearImputer.setup_sparse_system(
            1.0 - hole, image.transpose(2, 0, 1), neighbors_weights
        )
        expected = image.copy()
        expected[hole] = spsolve(csc_matrix(system), right)
        np.testing.assert_allclose(filled, expected, rtol=0, atol=LIMIT)
