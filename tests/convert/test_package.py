"""Folders for timm, torchvision and transformers: what is in them, and what is refused whole."""

import errno
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.convert import arguments_of, import_weights, read_weights, recognize
from vision_jax.convert.package import preprocessing_of, read_config, write_package
from vision_jax.errors import UserError
from vision_jax.models.convnext import ConvNeXt
from vision_jax.models.families import build_model
from vision_jax.trees.paths import flatten

PREPROCESSING = {
    "image_size": (64, 64),
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "crop_pct": 0.875,
    "crop_mode": "center",
    "interpolation": "bicubic",
}
NAMES = ("cat", "dog", "owl")


def small(**arguments):
    given = {"num_classes": 3, "depths": (1, 1, 1, 1), "widths": (4, 4, 8, 8), **arguments}
    model = ConvNeXt(**given)
    images = jnp.zeros((1, 32, 32, model.in_channels))
    like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    draw = lambda leaf: rng.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return arguments_of(model), {path: draw(leaf) for path, leaf in flatten(like).items()}


def test_each_librarys_files(tmp_path):
    arguments, params = small()
    options = {"class_names": NAMES, "preprocessing": PREPROCESSING}
    timm = write_package(tmp_path / "a/timm", params, "convnext", arguments, to="timm", **options)
    assert [path.name for path in timm] == ["model.safetensors", "config.json"]
    config = read_config(tmp_path / "a/timm")
    assert (config["architecture"], config["num_classes"]) == ("convnext_tiny", 3)
    assert config["label_names"] == list(NAMES)
    assert config["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert config["pretrained_cfg"]["first_conv"] == "stem.0"
    assert config["pretrained_cfg"]["classifier"] == "head.fc"

    hub = write_package(
        tmp_path / "hub", params, "convnext", arguments, to="transformers", **options
    )
    assert [path.name for path in hub] == [
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    ]
    config = read_config(tmp_path / "hub")
    assert config["architectures"] == ["ConvNextForImageClassification"]
    assert config["id2label"] == {"0": "cat", "1": "dog", "2": "owl"}
    processor = json.loads((tmp_path / "hub/preprocessor_config.json").read_text())
    assert processor["size"] == {"shortest_edge": 73}
    assert processor["crop_size"] == {"height": 64, "width": 64}

    for folder in (tmp_path / "a/timm", tmp_path / "hub"):
        weights = read_weights(str(folder))
        family, again = recognize(weights)
        model = build_model(family, **again)
        images = jnp.zeros((1, 32, 32, 3))
        like = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
        flat = import_weights(weights, flatten(like), again)
        assert flat.keys() == params.keys()
        for path, array in params.items():
            np.testing.assert_array_equal(flat[path], array, err_msg=path)
        assert weights.preprocessing["image_size"] == (64, 64)


def test_other_channels_are_said_to_timm(tmp_path):
    arguments, params = small(in_channels=5, mean=(0.5,) * 5, std=(0.5,) * 5)
    write_package(tmp_path, params, "convnext", arguments, to="timm")
    config = read_config(tmp_path)
    assert config["model_args"]["in_chans"] == 5
    assert len(config["pretrained_cfg"]["mean"]) == 5


REFUSED = {
    "small widths": ({}, "torchvision", {}, "torchvision has no convnext that is such a model"),
    "both of V1 and V2": (
        {"grn": True},
        "transformers",
        {},
        "transformers has no convnext that is such a model",
    ),
    "no npz": ({}, "npz", {}, "npz has no convnext"),
    "a crop of its own": (
        {},
        "transformers",
        {"crop_mode": "border"},
        "transformers has no processor .*use --to=timm",
    ),
    "no squares": (
        {},
        "transformers",
        {"image_size": (64, 32)},
        "transformers has no processor .*64 x 32 pixels",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_library_cannot_hold_leaves_no_files(name, tmp_path):
    changed, to, preprocessing, match = REFUSED[name]
    arguments, params = small(**changed)
    with pytest.raises(UserError, match=match) as caught:
        write_package(
            tmp_path / "out",
            params,
            "convnext",
            arguments,
            to=to,
            preprocessing=PREPROCESSING | preprocessing,
        )
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_parameters_without_a_name_leave_no_files(tmp_path):
    arguments, params = small()
    with pytest.raises(UserError, match="no name for adapter"):
        write_package(
            tmp_path / "out",
            params | {"adapter": np.zeros(2, np.float32)},
            "convnext",
            arguments,
            to="timm",
        )
    assert list(tmp_path.iterdir()) == []


def test_torchvisions_builders_take_three_channels(tmp_path):
    arguments = arguments_of(
        ConvNeXt(
            num_classes=3,
            depths=(3, 3, 9, 3),
            widths=(96, 192, 384, 768),
            in_channels=1,
            mean=(0.5,),
            std=(0.5,),
        )
    )
    with pytest.raises(UserError, match="images of 3 channels: use --to=timm"):
        write_package(tmp_path / "out", {}, "convnext", arguments, to="torchvision")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_no_weights_and_no_rest(tmp_path, monkeypatch):
    arguments, params = small()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_package(tmp_path, params, "convnext", arguments, to="timm")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_late_leaves_what_was_there(tmp_path, monkeypatch):
    """Weights and configs appear together, also where the caller's folder holds an older model."""
    arguments, params = small()
    write_package(tmp_path, params, "convnext", arguments, to="timm")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    other = {path: 2 * array for path, array in params.items()}
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            write_package(folder, other, "convnext", arguments, to="timm")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_preprocessing_is_completed_as_timm_would():
    arguments, _ = small()
    assert preprocessing_of(arguments, None) is None  # no size is known
    found = preprocessing_of(arguments, {"image_size": [40, 48], "crop_pct": 1.0})
    assert found == {
        "image_size": (40, 48),
        "mean": arguments["mean"],
        "std": arguments["std"],
        "crop_pct": 1.0,
        "crop_mode": "center",
        "crop_rule": "torchvision",
        "interpolation": "bicubic",
    }


def test_images_that_are_not_square_are_not_cut_unless_the_weights_say_so():
    arguments, _ = small()
    crop = {"crop_pct": 0.875, "crop_mode": "center", "crop_rule": "torchvision"}
    whole = crop | {"crop_pct": 1.0, "crop_mode": "squash"}
    for own, size, expected in [({}, (40, 40), crop), ({}, (40, 48), whole)]:
        found = preprocessing_of(arguments | {"image_size": size}, own)
        assert {key: found[key] for key in expected} == expected
