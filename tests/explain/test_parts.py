"""Boxes and regions: which they are, what is explained of them, and maps of each by itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models.test_contract import CASES, build, random_images, random_variables

from vision_jax.attacks.examples import keys_of
from vision_jax.errors import UserError
from vision_jax.explain import detections, parts, regions
from vision_jax.explain.forward import Forward
from vision_jax.explain.parts import Wanted
from vision_jax.models.families import FAMILIES
from vision_jax.ops.boxes import area_xyxy
from vision_jax.ops.detection_outputs import POSTPROCESS
from vision_jax.ops.resize import resize_bilinear
from vision_jax.tasks.detection.objective import pixel_mask

DETECTORS = [name for name in CASES if FAMILIES[name].task == "detection"]
SEGMENTERS = [name for name in CASES if FAMILIES[name].task == "segmentation"]
FAST = {"rise": {"masks": 4, "cells": 2}, "smooth_grad": {"samples": 2}}


def subject(family):
    """(model, random variables, images f[2, H, W, 3], sizes: the second image does not fill it)."""
    size = (64, 64) if FAMILIES[family].task == "detection" else CASES[family].size
    more = {"least_score": 0.0} if family in ("retinanet", "fcos") else {}
    model = build(family, **more)
    height, width = size
    sizes = jnp.array([size, (height - 16, width - 8)], jnp.int32)
    variables = random_variables(model, size)
    return model, variables, random_images(model, size, 2), sizes


@pytest.mark.long
@pytest.mark.parametrize("family", DETECTORS)
def test_boxes_are_the_detectors_own_and_their_places_say_them(family):
    model, variables, images, sizes = subject(family)
    predicts = FAMILIES[family].predicts
    found = parts.make_find_parts(model, Wanted(most=4, least=1e-3))(variables, images, sizes)
    mask = pixel_mask(sizes, images.shape[1:3])

    @jax.jit
    def expect(variables, images, mask):
        outputs = model.apply(variables, images, mask)
        return outputs, POSTPROCESS[predicts](outputs, sizes)

    outputs, own = expect(variables, images, mask)
    order = np.argsort(-own["score"], axis=1, kind="stable")[:, :4]
    best = np.take_along_axis(np.asarray(own["score"]), order, axis=1)
    np.testing.assert_allclose(found.score, np.where(best >= 1e-3, best, 0), rtol=1e-5)
    there = np.asarray(found.score) > 0
    assert there.any()
    sides = np.tile(np.asarray(sizes)[:, None, ::-1], 2)
    boxes = np.take_along_axis(np.asarray(own["boxes_xyxy_px"]), order[..., None], 1) / sides
    np.testing.assert_allclose(found.xyxy_01[there], boxes[there].clip(0, 1), atol=1e-5)
    for number in range(there.shape[1]):
        box = jax.tree.map(lambda x, n=number: x[:, n], found)
        said = detections.places_of(predicts, outputs, box.label, sizes)
        rows = np.arange(2)[there[:, number]]
        at = (rows, np.asarray(box.place)[rows])
        np.testing.assert_allclose(said.score[at], box.score[rows], rtol=1e-4)
        np.testing.assert_allclose(said.xyxy_01[at], box.xyxy_01[rows], atol=2e-5)
        logit = detections.box_logit(predicts, box, sizes)(outputs)
        np.testing.assert_allclose(logit[rows], said.logit[at], rtol=1e-5)
        score = detections.box_score(predicts, box, sizes)(outputs)
        area = area_xyxy(box.xyxy_01) > 1e-4  # a random box may lie beyond its image
        assert (score >= box.score * (1 - 1e-3))[there[:, number] & area].all()  # as its place says


def test_the_score_of_a_box_is_the_best_product_of_overlap_and_score():
    boxes = jnp.array([[[0.2, 0.2, 0.4, 0.4], [0.3, 0.2, 0.4, 0.4], [0.8, 0.8, 0.2, 0.2]]])
    outputs = {"logits": jnp.array([[[0.0, 2.0], [0.0, 1.0], [0.0, 9.0]]]),
               "boxes_cxcywh_01": boxes}  # fmt: skip
    box = detections.Boxes(
        jnp.array([0]), jnp.array([1]), jnp.ones(1), jnp.array([[0.1, 0.0, 0.5, 0.4]])
    )
    found = detections.box_score("sides", box, jnp.array([[10, 10]]))(outputs)
    overlap = 0.3 / 0.5, 1.0, 0.0  # of 0.4 wide boxes that are 0.1 apart
    chances = 1 / (1 + np.exp([-2.0, -1.0, -9.0]))
    np.testing.assert_allclose(found, [(np.array(overlap) * chances).max()], rtol=1e-5)


def explained(model, name, variables, images, sizes, found):
    run = parts.make_explain_parts(model, name, **FAST.get(name, {}))
    keys = keys_of(jax.random.key(3), jnp.arange(len(images)))
    maps = run(variables, images, sizes, found, keys)
    again = run(variables, images, sizes, jax.tree.map(lambda x: x[:, ::-1], found), keys)
    assert run._cache_size() == 1  # other parts are arguments
    np.testing.assert_allclose(again[:, ::-1], maps, rtol=0, atol=1e-5 * np.abs(maps).max())
    return np.asarray(maps)


@pytest.mark.long
@pytest.mark.parametrize("name", ["layer_cam", "saliency", "rise", "attention_relevance"])
@pytest.mark.parametrize("family", [*DETECTORS, *SEGMENTERS])
def test_a_map_is_of_its_part_and_image_alone(family, name):
    """Whatever other parts there are, and what lies in the padding of a detector's image."""
    if name == "attention_relevance" and family != "detr":
        with pytest.raises(UserError, match="there is no method"):
            parts.choose_methods(build(family), [name])
        return
    model, variables, images, sizes = subject(family)
    sizes = sizes if FAMILIES[family].pixel_mask else sizes.at[1].set(sizes[0])
    found = parts.make_find_parts(model, Wanted(most=3, least=0.0))(variables, images, sizes)
    maps = explained(model, name, variables, images, sizes, found)
    assert maps.shape == (2, found.score.shape[1], *images.shape[1:3])
    assert np.isfinite(maps).all()
    assert np.abs(maps).max() > 0
    height, width = sizes[1].tolist()
    changed = images.at[1, height:].set(0.9).at[1, :, width:].set(0.1)
    one = jax.tree.map(lambda x: x[1:, 1:2], found)
    run = parts.make_explain_parts(model, name, **FAST.get(name, {}))
    keys = keys_of(jax.random.key(3), jnp.arange(2))[1:]
    alone = run(variables, changed[1:], sizes[1:], one, keys)
    scale = np.abs(maps).max()
    np.testing.assert_allclose(
        alone[0, 0, :height, :width], maps[1, 1, :height, :width], rtol=0, atol=1e-4 * scale
    )


@pytest.mark.long
@pytest.mark.parametrize("family", SEGMENTERS)
def test_regions_are_where_a_class_or_a_mask_is(family):
    model, variables, images, sizes = subject(family)
    predicts = FAMILIES[family].predicts
    sizes = sizes.at[:, 0].add(-3)  # padding is in no region
    found = parts.make_find_parts(model, Wanted(most=3, least=0.0))(variables, images, sizes)
    outputs, _ = Forward(model)(variables, images)
    size = images.shape[1:3]
    valid = np.asarray(pixel_mask(sizes, size))
    for image in range(2):
        for number in np.flatnonzero(found.score[image] > 0):
            label, query = (int(x[image, number]) for x in (found.label, found.query))
            inside = np.asarray(found.inside[image, number])
            assert inside.any()
            one = jax.tree.map(lambda x, n=number: x[:, n], found)
            if predicts == "semantic":
                logits = np.asarray(resize_bilinear(outputs["logits"], size))[image]
                np.testing.assert_array_equal(inside, (logits.argmax(-1) == label) & valid[image])
                chance = np.exp(logits[..., label]) / np.exp(logits).sum(-1)
                expected, score = logits[..., label][inside].mean(), chance[inside].mean()
            else:
                masks = outputs["mask_logits"][-1, image, query][None, ..., None]
                mask = np.asarray(resize_bilinear(masks, size))[0, ..., 0]
                np.testing.assert_array_equal(inside, (mask > 0) & valid[image])
                classes = np.asarray(outputs["logits"][-1, image, query])
                assert label == classes[:-1].argmax()
                expected = classes[label] + mask[inside].mean()
                chance = 1 / (1 + np.exp(-mask[inside]))
                score = np.exp(classes[label]) / np.exp(classes).sum() * chance.mean()
            ours = regions.region_score(predicts, one)(outputs)[image]
            np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.score[image, number], score, rtol=1e-4)
            again = regions.region_probability(predicts, one)(outputs)[image]
            np.testing.assert_allclose(again, score, rtol=1e-4)


def test_a_map_that_says_nothing_points_nowhere():
    maps = jnp.zeros((1, 2, 4, 4)).at[0, 1, 0, 0].set(1)
    inside = jnp.zeros(maps.shape, bool).at[:, :, 0, 0].set(True)
    found = parts.measure(maps, inside, jnp.array([[3, 2]]))
    assert found["pointing"].tolist() == [[0, 1]]


def test_padding_counts_nowhere():
    maps = np.zeros((1, 2, 6, 8), np.float32)
    maps[0, :, 5, 7] = 9  # beyond the image
    maps[0, :, 1, 2] = 3
    maps[0, :, 3, 4] = 1
    inside = np.zeros(maps.shape, bool)
    inside[0, 0, 1, 2] = inside[0, 1, 3, 4] = True
    sizes = jnp.array([[4, 6]])
    found = parts.measure(jnp.asarray(maps), jnp.asarray(inside), sizes)
    assert found["pointing"].tolist() == [[1, 0]]
    np.testing.assert_allclose(found["inside"], [[0.75, 0.25]])
    nothing = parts.chance(jnp.asarray(inside), sizes)
    np.testing.assert_allclose(nothing["pointing"], [[1 / 24, 1 / 24]])


def test_pixels_of_a_box_are_those_whose_centers_it_holds():
    box = detections.Boxes(
        jnp.zeros((1, 1), int), jnp.zeros((1, 1), int), jnp.ones((1, 1)),
        jnp.array([[[0.25, 0.0, 0.75, 0.5]]]),
    )  # fmt: skip
    inside = np.asarray(parts.inside_of(box, jnp.array([[4, 8]]), (6, 10)))[0, 0]
    expected = np.zeros((6, 10), bool)
    expected[:2, 2:6] = True
    np.testing.assert_array_equal(inside, expected)


def test_logits_are_those_of_the_raw_outputs(rng):
    """Of a YOLOX with the object's; of a Faster R-CNN after the class that is none."""
    labels, sizes = jnp.array([2, 0]), jnp.array([[10, 10], [10, 10]])
    drawn = {"logits": rng.normal(size=(2, 5, 3)), "object_logits": rng.normal(size=(2, 5)),
             "boxes_cxcywh_01": rng.random((2, 5, 4))}  # fmt: skip
    outputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
    said = detections.places_of("cells", outputs, labels, sizes)
    for image, label in enumerate((2, 0)):
        logit, thing = drawn["logits"][image, :, label], drawn["object_logits"][image]
        np.testing.assert_allclose(said.logit[image], logit + thing, rtol=1e-5, atol=1e-6)
        score = 1 / (1 + np.exp(-logit)) / (1 + np.exp(-thing))
        np.testing.assert_allclose(said.score[image], score, rtol=1e-5)
    drawn = {"logits": rng.normal(size=(2, 5, 4)), "deltas": np.zeros((2, 5, 4, 4)),
             "proposals_xyxy_px": np.tile([1.0, 2, 5, 8], (2, 5, 1))}  # fmt: skip
    outputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn)
    outputs["proposed"] = jnp.arange(5)[None] < jnp.array([[5], [3]])
    said = detections.places_of("proposals", outputs, labels, sizes)
    for image, label in enumerate((2, 0)):
        logits = drawn["logits"][image]
        np.testing.assert_allclose(said.logit[image], logits[:, label + 1], rtol=1e-5)
        score = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[:, label + 1]
        score = np.where(outputs["proposed"][image], score, 0)
        np.testing.assert_allclose(said.score[image], score, rtol=1e-5)
    np.testing.assert_allclose(said.xyxy_01[0, 0], [0.1, 0.2, 0.5, 0.8], rtol=1e-5)


def test_many_parts_take_the_memory_of_few(rng):
    """Each has a large intermediate array; of 64 parts there are eight of it at once."""

    def of_one(x):  # f[B] -> f[B, 3]
        large = jnp.sin(x[:, None] * jnp.arange(50_000.0)[None])
        return jnp.sort(large, axis=1)[:, [0, 17, -1]]

    run = jax.jit(lambda x: parts.of_each(of_one, x))
    few, many = (
        run.lower(jnp.zeros((1, count))).compile().memory_analysis().temp_size_in_bytes
        for count in (parts.AT_ONCE, 8 * parts.AT_ONCE)
    )
    assert many < 2.5 * few
    drawn = jnp.asarray(rng.random((1, 19)), jnp.float32)  # the last ones are fewer
    expected = jnp.stack([of_one(drawn[:, n]) for n in range(19)], axis=1)
    np.testing.assert_allclose(run(drawn), expected, rtol=1e-4, atol=1e-5)


def test_methods_are_those_that_fit():
    methods = partial(parts.choose_methods, build("detr"))
    assert methods([]) == ["attention_relevance", "layer_cam", "grad_cam", "saliency"]
    assert {"rise", "occlusion"} < set(methods(["all"]))
    with pytest.raises(UserError, match="did you mean `grad_cam`"):
        methods(["gradcam"])
    assert "attention_relevance" not in parts.choose_methods(build("yolox"), ["all"])
