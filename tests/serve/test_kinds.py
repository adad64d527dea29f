"""Batches of every family answer what the model says of each image by itself."""

import base64
import dataclasses
import io
import json

import detection_runs
import numpy as np
import pytest
import runs
import segmentation_runs
import serving_runs
from PIL import Image

from vision_jax import train
from vision_jax.commands import predict as predict_command
from vision_jax.config import load_config
from vision_jax.data.decode import DamagedImageError
from vision_jax.errors import UserError
from vision_jax.export import certificate
from vision_jax.export.certificate import host_pipeline
from vision_jax.export.samples import SAMPLES, make_sample
from vision_jax.serve.model import compile_programs, make_servable

pytest.importorskip("starlette", reason="the extra serve")
SIZES = [(80, 61), (50, 90), (128, 128), (33, 40), (300, 270)]


def compare(loaded, rng, sizes=SIZES, image_sizes=()):
    """Serves images in batches of 1 and 3, and compares with the model on the host."""
    servable = make_servable(loaded, image_sizes)
    programs = compile_programs(servable, (1, 3))
    images = certificate.fresh_images(rng, len(sizes), sizes, 3)
    run = host_pipeline(loaded, servable.kind)
    want = [run(image) for image in images]
    found = {}
    with serving_runs.compilations() as compiled:
        views = [servable.look(image[0]) for image in images]
        for canvas in {view.canvas for view in views}:
            rows = [row for row, view in enumerate(views) if view.canvas == canvas]
            for first in range(0, len(rows), 3):
                some = rows[first : first + 3]
                answers = programs.run(canvas, [views[row] for row in some])
                found |= dict(zip(some, answers, strict=True))
    assert not compiled
    for row, ours in enumerate(want):
        theirs = {name: array[None] for name, array in found[row].items()}
        if servable.kind == "pixels":
            assert theirs["label"].shape == ours["label"].shape
            assert (theirs["label"] == ours["label"]).mean() > 0.999
            continue
        if servable.kind == "classes":
            powers = np.exp(theirs["logits"])
            theirs["probabilities"] = powers / powers.sum()
        told = certificate.compare(servable.kind, [ours], [theirs])
        assert max(told["relative_error"].values()) < 1e-5, told
        assert told["agreement"] == 1.0


DENSE = ("deeplab", "eomt", "segformer", "unet", "upernet")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in DENSE])
def test_batches_say_what_images_say_alone(name, rng):
    compare(make_sample(name, seed=int(rng.integers(2**31))), rng)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "view"),
    [
        *((name, view) for name in DENSE for view in ("squash", "pad")),
        ("unet", "original"),
        ("segformer", "short"),
    ],
    ids=lambda value: value,
)
def test_masks_of_every_view(name, view, rng):
    loaded = make_sample(name, seed=int(rng.integers(2**31)))
    own = dataclasses.replace(loaded.preprocessing, view=view)
    loaded = dataclasses.replace(loaded, preprocessing=own)
    if view in ("squash", "pad"):
        compare(loaded, rng)
    else:
        sizes = [(64, 64), (64, 128), (64, 64), (96, 64)]
        compare(loaded, rng, sizes, sorted(set(sizes)))


@pytest.mark.long
def test_an_image_of_a_size_that_was_not_compiled():
    loaded = make_sample("unet")
    own = dataclasses.replace(loaded.preprocessing, view="original")
    servable = make_servable(dataclasses.replace(loaded, preprocessing=own), [(64, 96), (32, 32)])
    assert servable.canvases == servable.only == ((64, 96), (32, 32))
    with pytest.raises(DamagedImageError, match=r"--image-size=48,64") as told:
        servable.look(np.zeros((48, 64, 3), np.uint8))
    assert "64 x 96, 32 x 32" in str(told.value)


@pytest.mark.long
def test_what_cannot_be_served():
    loaded = make_sample("unet")
    own = dataclasses.replace(loaded.preprocessing, view="original")
    loaded = dataclasses.replace(loaded, preprocessing=own)
    with pytest.raises(UserError, match="a stride of 30"):
        make_servable(loaded, (), 20, 30)
    with pytest.raises(UserError, match="--image-size beside --window"):
        make_servable(loaded, [(32, 32)], 20)
    squashed = dataclasses.replace(loaded, preprocessing=dataclasses.replace(own, view="squash"))
    with pytest.raises(UserError, match=r"--window: .* leave it out"):
        make_servable(squashed, (), 20)
    with pytest.raises(UserError, match="leave it out"):
        make_servable(make_sample("vit"), [(3, 3)])


# By HTTP, of runs ---------------------------------------------------------------------------------


def predicted(workdir, folder, files):
    """predictions.json of a run, of files {name: bytes}."""
    names = serving_runs.write_files(folder, files)
    config = load_config(str(workdir / "config.json"), {})
    assert predict_command.run(config, workdir, "last", names, folder / "out") == 0
    return json.loads((folder / "out/predictions.json").read_text())


@pytest.mark.long
def test_a_run_of_a_classifier_with_adapters(rng, tmp_path):
    files = {f"{n}.png": serving_runs.photo(rng, *rng.integers(9, 60, 2)) for n in range(6)}
    want = predicted(runs.finished(), tmp_path, files)["images"]
    with serving_runs.serving(runs.finished(), "--most-images=9") as (port, _):
        status, found = serving_runs.form(port, files, "?top=9")
    assert status == 200
    for one, other in zip(want, found["images"], strict=True):
        assert one["class"] == other["class"]
        shares = dict(other["top"])
        np.testing.assert_allclose(
            [shares[name] for name in runs.CLASSES], one["probabilities"], rtol=1e-5
        )


@pytest.mark.long
def test_a_run_of_a_detector(rng, tmp_path):
    workdir = detection_runs.finished()
    files = {f"{n}.png": serving_runs.photo(rng, *rng.integers(30, 90, 2)) for n in range(5)}
    want = predicted(workdir, tmp_path, files)
    config = load_config(str(workdir / "config.json"), {})
    with serving_runs.serving(workdir) as (port, parts):
        assert parts.default.score == config.evaluate.score
        status, found = serving_runs.form(port, files)
        assert status == 200
        status, every = serving_runs.form(port, files, "?score=0")
    assert sum(len(one["boxes"]) for one in every["images"]) > 0
    for one, other in zip(want, found["images"], strict=True):
        same_boxes(one["boxes"], other["boxes"])


def same_boxes(ours, theirs):
    assert [box["name"] for box in ours] == [box["name"] for box in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(other["box_xyxy_px"], one["box_xyxy_px"], rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(other["score"], one["score"], rtol=1e-5)


@pytest.mark.long
def test_a_run_of_a_segmenter(rng, tmp_path):
    """Its masks to the pixel, with the objects that predict counts."""
    workdir = segmentation_runs.finished()
    files = {f"{n}.png": serving_runs.photo(rng, 24, 32) for n in range(3)}
    want = predicted(workdir, tmp_path, files)["images"]
    with serving_runs.serving(workdir, "--image-size=24,32") as (port, _):
        status, found = serving_runs.form(port, files)
        assert status == 200
        status, bare = serving_runs.form(port, files, "?mask=0")
        other = serving_runs.predict(port, serving_runs.photo(rng, 25, 32))
        assert other[0] == 422
    for one, theirs, without in zip(want, found["images"], bare["images"], strict=True):
        png = base64.b64decode(theirs.pop("mask_png"))
        mask = np.asarray(Image.open(io.BytesIO(png)))
        ours = np.asarray(Image.open(tmp_path / "out" / one["mask"]))
        assert (mask == ours).mean() > 0.999
        assert theirs["shares"].keys() == one["shares"].keys()
        assert abs(theirs["objects"] - one["objects"]) <= 1
        assert without == theirs


@pytest.mark.long
def test_real_weights_find_what_predict_finds(tmp_path):
    """NanoDet on its canvas, photos of several sizes in one batch."""
    tiles = sorted((runs.ROOT / "vision_jax/data/assets/aerial").glob("*.jpg"))[:3]
    files = {tile.name: tile.read_bytes() for tile in tiles}
    weights = "embedded:nanodet_coco"
    names = serving_runs.write_files(tmp_path, files)
    overrides = {"evaluate.score": "0.1"}
    assert predict_command.run(overrides, None, "last", names, tmp_path / "out", weights) == 0
    want = json.loads((tmp_path / "out/predictions.json").read_text())
    with serving_runs.serving(weights, "--score=0.1") as (port, _):
        status, found = serving_runs.form(port, files)
    assert status == 200
    assert sum(len(one["boxes"]) for one in want) > 0
    for one, other in zip(want, found["images"], strict=True):
        same_boxes(one["boxes"], other["boxes"])


@pytest.mark.long
@pytest.mark.parametrize("view", ["original", "windows"])
def test_windows_of_images_of_any_size(view, rng, tmp_path):
    """As `predict` sees them: in windows of the run's, or in those that its view has."""
    more = {"evaluate__window": 20} if view == "original" else {}
    workdir = tmp_path / "run"
    assert train.run(segmentation_runs.tiny_config(data__view=view, **more), workdir) == 0
    sizes = [(24, 32), (50, 41), (16, 70), (90, 30)]
    files = {f"{n}.png": serving_runs.photo(rng, *size) for n, size in enumerate(sizes)}
    want = predicted(workdir, tmp_path, files)["images"]
    with serving_runs.serving(workdir) as (port, parts):
        assert parts.servable.canvases == (((20, 20),) if more else ((16, 16),))
        compiled = serving_runs.gauge(port, "vision_jax_compilations_total")
        status, found = serving_runs.form(port, files)
        assert status == 200
        for data in files.values():
            assert serving_runs.predict(port, data)[0] == 200
        assert serving_runs.gauge(port, "vision_jax_compilations_total") == compiled
        thin = serving_runs.photo(rng, 1, 17_000)
        status, said = serving_runs.predict(port, thin)
        assert (status, said["error"]) == (
            413,
            "image: 1 x 17000 pixels: at most 16384 a side: shrink it",
        )
    for one, theirs in zip(want, found["images"], strict=True):
        mask = np.asarray(Image.open(io.BytesIO(base64.b64decode(theirs["mask_png"]))))
        ours = np.asarray(Image.open(tmp_path / "out" / one["mask"]))
        assert mask.shape == ours.shape
        assert (mask == ours).mean() > 0.999
