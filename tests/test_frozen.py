"""The command probe: features of weights as they are, evaluated without training."""

import json

import jax
import numpy as np
import pytest
import runs

from vision_jax import convert
from vision_jax.commands import probe
from vision_jax.data.sources import read_source
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.ops.probe import few_shot_predict, knn_predict
from vision_jax.trees import paths


def features(split):
    """(pooled features f32[N, D], labels) by the plainest way there is."""
    weights = convert.read_weights(str(runs.inputs() / "weights.safetensors"))
    family, arguments = convert.recognize(weights)
    model = build_model(family, **{**arguments, "num_classes": 0})
    like = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 16, 16, 3)))["params"]
    head = ("head/kernel", "head/bias")
    flat = convert.import_weights(weights, paths.flatten(like), arguments, reinitialized=head)
    source = read_source(f"cifar10:{runs.inputs()}/{split}")
    preprocessing = Preprocessing(**weights.preprocessing)
    views = [eval_transform(source[i]["image"], preprocessing) for i in range(len(source))]
    images = np.stack(views).astype(np.float32) / 255
    return np.asarray(model.apply({"params": paths.unflatten(like, flat)}, images)), source.labels


@pytest.mark.long
def test_the_numbers_are_those_of_the_features(tmp_path, capsys):
    config = runs.tiny_config(
        evaluate__neighbors="(1, 3)", evaluate__shots="(2,)", evaluate__repeats=2
    )
    assert probe.run(config, tmp_path) == 0
    screen = capsys.readouterr().out
    record = json.loads((tmp_path / "probe.json").read_text())
    assert f"wrote {tmp_path / 'probe.json'}" in screen

    (train, labels), (test, truth) = features("train"), features("test")
    assert record["features"] == train.shape[1]
    arguments = (train, labels, test)
    nearest = knn_predict(*arguments, num_classes=4, neighbors=(1, 3))
    shots = [few_shot_predict(*arguments, num_classes=4, shots=2, seed=s) for s in (0, 1)]
    expected = {
        "1 nearest neighbours": [float((nearest[1] == truth).mean())],
        "3 nearest neighbours": [float((nearest[3] == truth).mean())],
        "2 images a class": [float((predicted == truth).mean()) for predicted in shots],
    }
    assert record["top1"].keys() == expected.keys()
    for name, values in expected.items():  # one image of 20 may fall on the other side
        np.testing.assert_allclose(record["top1"][name], values, atol=0.051)
        assert f"{name}" in screen


def test_weights_are_needed(tmp_path):
    config = runs.tiny_config(model__weights="", model__variant="b/16")
    with pytest.raises(UserError, match=r"set config\.model\.weights"):
        probe.run(config, tmp_path)
