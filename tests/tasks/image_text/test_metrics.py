"""Retrieval, prompts, and what is said of a collapse."""

import numpy as np
import pytest

from vision_jax.errors import UserError
from vision_jax.ops.contrastive import constant_loss
from vision_jax.tasks.collapse import Watching, spread
from vision_jax.tasks.image_text import metrics

WATCH = metrics.Watch(pairs=64, warn_after=60, warmup_steps=20, stop=False)
HEALTHY = {"loss": 2.0, "image_spread": 0.9, "text_spread": 0.9, "logit_bias": -10.0}


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_recall_against_a_sort(rng):
    """Images with one to three captions, each caption of one to two images."""
    images, texts = unit(rng.normal(size=(30, 6))), unit(rng.normal(size=(40, 6)))
    pairs = np.array([(i, (7 * i + j) % 40) for i in range(30) for j in range(1 + i % 3)])
    pairs = np.concatenate([pairs, np.stack([np.arange(40) % 30, np.arange(40)], 1)])
    rng.shuffle(pairs)
    names = [f"{i}.png" for i in pairs[:, 0]]
    captions = [f"caption {i}" for i in pairs[:, 1]]
    found = metrics.summarize(images[pairs[:, 0]], texts[pairs[:, 1]], names, captions)
    right = {tuple(pair) for pair in pairs.tolist()}
    for depth in (1, 5):
        order = np.argsort(-(images @ texts.T), axis=1)[:, :depth]
        hits = [any((i, t) in right for t in order[i].tolist()) for i in range(30)]
        assert found[f"image_to_text_{depth}"] == pytest.approx(np.mean(hits))
        order = np.argsort(-(texts @ images.T), axis=1)[:, :depth]
        hits = [any((i, t) in right for i in order[t].tolist()) for t in range(40)]
        assert found[f"text_to_image_{depth}"] == pytest.approx(np.mean(hits))
    mean = (found["image_to_text_1"] + found["text_to_image_1"]) / 2
    assert found["recall"] == pytest.approx(mean)
    assert found["count"] == len(pairs)


def test_many_queries_are_ranked_in_parts(rng):
    features = unit(rng.normal(size=(metrics.CHUNK + 70, 4)))
    pairs = np.stack([np.arange(len(features))] * 2, 1)
    assert not metrics.best_ranks(features, features, pairs).any()


def test_constant_features_find_nothing():
    same = unit(np.ones((20, 3), np.float32))
    names = [str(i) for i in range(20)]
    found = metrics.summarize(same, same, names, names)
    assert found["image_to_text_5"] == found["text_to_image_5"] == 0


def test_features_that_are_no_numbers_are_refused():
    bad = np.ones((3, 2))
    bad[1, 0] = np.nan
    with pytest.raises(UserError, match="not finite for 1 of 3 pairs"):
        metrics.summarize(np.ones((3, 2)), bad, ["a", "b", "c"], ["a", "b", "c"])


def test_a_class_is_the_mean_of_its_prompts(rng):
    prompts = unit(rng.normal(size=(6, 4)))
    found = metrics.class_features(prompts, 3)
    np.testing.assert_allclose(found[1], unit(prompts[2:4].mean(0, keepdims=True))[0])
    assert found.shape == (3, 4)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"image_spread": 0.001}, "the features of all images agree (spread 0.0010): the rate"),
        ({"text_spread": 0.001}, "or the captions are alike"),
        ({"loss": constant_loss(64)}, "no pair is told from others (loss 5.1510, of one logit"),
        ({"loss": 64 * np.log(2), "logit_bias": 0.0}, "logit_bias is 0.0"),
    ],
)
def test_what_is_said_of_a_collapse(changed, said):
    found = WATCH.diagnose({**HEALTHY, **changed}, 500)
    assert said in found
    assert bool(found) == bool(said)


def test_the_loss_is_judged_after_the_warm_up_and_each_kind_is_named_once():
    bad = {**HEALTHY, "loss": 6.0}
    assert WATCH.diagnose(bad, 79) == ""
    watch = Watching(WATCH)
    assert [step for step in range(1, 300) if watch(step, bad)] == [80]
    stopping = Watching(metrics.Watch(pairs=64, warn_after=60, warmup_steps=20, stop=True))
    for step in range(1, 80):
        assert stopping(step, bad) == []
    with pytest.raises(UserError, match=r"step 80: collapse: .*config.text.stop ended this one"):
        stopping(80, bad)


def test_a_batch_of_one_pair_has_nothing_to_tell_apart():
    alone = metrics.Watch(pairs=1, warn_after=0, warmup_steps=0, stop=False)
    assert alone.diagnose(HEALTHY, 500) == ""


def test_spread():
    same = np.tile([0.6, 0.8], (1, 5, 1)).astype(np.float32)
    assert float(spread(same)) < 1e-3
    assert float(spread(np.concatenate([same, -same], 1))) == pytest.approx(1)
