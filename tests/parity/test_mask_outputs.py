"""Instances and panoptic segments against transformers' EomtImageProcessor, on the same outputs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import EomtImageProcessor

from vision_jax.data.detection_transforms import bounded_size
from vision_jax.ops.mask_outputs import View, instance_outputs, panoptic_outputs
from vision_jax.tasks.segmentation.objective import mask_scores, unpad_scores
from vision_jax.tasks.segmentation.segments import instance_segments, panoptic_segments

# (masks' side, canvas, image): squares, and what is padded at the bottom or at the right.
SIZES = [(8, 32, (32, 32)), (12, 24, (37, 37)), (10, 40, (33, 57)), (7, 21, (50, 29))]
ODD = [*SIZES, (9, 36, (48, 64)), (8, 32, (5, 200)), (8, 33, (101, 77)), (16, 64, (427, 640))]
CLASSES, QUERIES = 4, 12


def draw(rng, side, sharp=6.0):
    """Logits f64 of classes and of smooth blobs, so that some queries agree and overlap."""
    logits = rng.normal(size=(2, QUERIES, CLASSES + 1)) * sharp
    y, x = np.mgrid[:side, :side] / side
    cy, cx, radius = rng.uniform(size=(3, 2, QUERIES, 1, 1))
    blobs = 20 * (0.1 + radius / 2 - np.hypot(y - cy, x - cx))
    return logits, blobs + rng.normal(size=blobs.shape)


def outputs_of(logits, masks):
    return SimpleNamespace(
        class_queries_logits=torch.from_numpy(logits),
        masks_queries_logits=torch.from_numpy(masks),
        patch_offsets=None,
    )


def view_of(canvas, image):
    """The image is padded to the canvas, as the processor resizes and pads it."""
    return View((canvas, canvas), bounded_size(image, canvas, canvas), image)


@pytest.mark.parametrize(("side", "canvas", "image"), SIZES)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.8])
def test_instances(rng, side, canvas, image, threshold):
    processor = EomtImageProcessor(size={"shortest_edge": canvas, "longest_edge": canvas})
    logits, masks = draw(rng, side)
    masks[0, 0] = -5.0  # an empty one
    theirs = processor.post_process_instance_segmentation(
        outputs_of(logits, masks), [image] * 2, threshold=threshold
    )
    with jax.enable_x64(True):
        found = instance_outputs(jnp.asarray(logits), jnp.asarray(masks), view_of(canvas, image))
        found = jax.device_get(found)
    for b, reference in enumerate(theirs):
        infos = reference["segments_info"]  # in the order of queries
        ours = instance_segments(
            *(found[name][b] for name in ("score", "label", "mask_bits")), image, threshold
        )
        order = sorted(range(len(infos)), key=lambda i: -infos[i]["score"])
        assert ours.label.tolist() == [infos[i]["label_id"] for i in order]
        scores = [infos[i]["score"] for i in order]
        np.testing.assert_allclose(ours.score, scores, atol=6e-7)  # they round
        back = ours[np.argsort(order)] if order else ours
        np.testing.assert_array_equal(back.map(), reference["segmentation"].numpy())
    assert found["score"][0, 0] == 0


@pytest.mark.parametrize(("side", "canvas", "image"), SIZES)
@pytest.mark.parametrize(
    "thresholds", [(0.8, 0.5, 0.8), (0.3, 0.5, 0.5), (0.5, 0.7, 0.3), (0.99999, 0.5, 0.8)]
)
def test_panoptic_segments(rng, side, canvas, image, thresholds):
    processor = EomtImageProcessor(size={"shortest_edge": canvas, "longest_edge": canvas})
    met = 0
    for _ in range(5):
        logits, masks = draw(rng, side)
        names = ("threshold", "mask_threshold", "overlap_mask_area_threshold")
        theirs = processor.post_process_panoptic_segmentation(
            outputs_of(logits, masks),
            [image] * 2,
            stuff_classes=[2, 3],
            **dict(zip(names, thresholds, strict=True)),
        )
        with jax.enable_x64(True):
            found = panoptic_outputs(
                jnp.asarray(logits),
                jnp.asarray(masks),
                view_of(canvas, image),
                threshold=thresholds[0],
                mask_threshold=thresholds[1],
                overlap_threshold=thresholds[2],
            )
            found = jax.device_get(found)
        for b, reference in enumerate(theirs):
            infos = reference["segments_info"]
            ours = panoptic_segments(*(found[n][b] for n in ("segments", "score", "label")), {2, 3})
            assert ours.label.tolist() == [one["label_id"] for one in infos]
            np.testing.assert_allclose(ours.score, [one["score"] for one in infos], atol=6e-7)
            np.testing.assert_array_equal(ours.map(), reference["segmentation"].numpy())
            met += len(infos)
    assert met or thresholds[0] > 0.9


@pytest.mark.parametrize(("side", "canvas", "image"), ODD)
def test_classes_of_padded_images_are_cut_out(rng, side, canvas, image):
    """By the processor's own function, which it applies to segments and not to classes."""
    size = {"shortest_edge": canvas, "longest_edge": canvas}
    logits, masks = draw(rng, side)
    wide = torch.nn.functional.interpolate(
        torch.from_numpy(masks), (canvas, canvas), mode="bilinear"
    )
    chances = torch.from_numpy(logits).softmax(-1)[..., :-1]
    scores = torch.einsum("bqc,bqhw->bchw", chances, wide.sigmoid())
    theirs = EomtImageProcessor(size=size).unpad_image(scores, [image] * 2, size)
    with jax.enable_x64(True):
        outputs = {"logits": jnp.asarray(logits)[None], "mask_logits": jnp.asarray(masks)[None]}
        ours = np.asarray(unpad_scores(mask_scores, canvas)(outputs, image))
    for mine, their in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, their.permute(1, 2, 0).numpy(), rtol=1e-12, atol=1e-12)
