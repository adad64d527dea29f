"""Real ImageNet weights on real photos: our top-5 beside those of PyTorch."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import timm
import torch
import torchvision
from PIL import Image

from vision_jax import convert
from vision_jax.certify import references
from vision_jax.convert import package
from vision_jax.convert.tables import table_for_export
from vision_jax.data.decode import decode_image
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.models.families import build_model
from vision_jax.trees import paths

LITE = {0: (224, "57934424"), 1: (240, "77cc7160"), 2: (260, "9656183e")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    spec = importlib.util.spec_from_file_location(
        "fetch_real_weights", runs.ROOT / "scripts/fetch_real_weights.py"
    )
    script = importlib.util.module_from_spec(spec)
    sys.modules["fetch_real_weights"] = script
    spec.loader.exec_module(script)
    folder = tmp_path_factory.mktemp("real")
    try:
        script.fetch(folder)
    except OSError as error:
        pytest.skip(str(error))
    return folder


def photos(folder: Path) -> list[tuple[Path, int]]:
    """Photos and their ImageNet labels, which their names end with."""
    return [(path, int(path.stem.split("_")[-1])) for path in sorted(folder.glob("*.jpg"))]


def our_logits(path: Path, preprocessing: Preprocessing, files: list[Path]) -> np.ndarray:
    """From the weight file and the photos' bytes, with our code alone but for the unpickling."""
    weights = convert.read_weights(str(path), allow_pickle=True)
    family, arguments = convert.recognize(weights)
    arguments |= {"mean": preprocessing.mean, "std": preprocessing.std}
    model = build_model(family, **arguments)
    views = np.stack(
        [eval_transform(decode_image(f.read_bytes(), name=f.name), preprocessing) for f in files]
    )
    images = jnp.asarray(views, jnp.float32) / 255
    target = references_target(model, images)
    flat = convert.import_weights(weights, target, arguments)
    variables = {
        collection: paths.unflatten(tree, {p: jnp.asarray(flat[p]) for p in paths.flatten(tree)})
        for collection, tree in shapes_of(model, images).items()
    }
    return np.asarray(jax.jit(model.apply)(variables, images))


def shapes_of(model, images):
    return jax.eval_shape(model.init, jax.random.key(0), images[:1])


def references_target(model, images):
    return {
        path: leaf
        for tree in shapes_of(model, images).values()
        for path, leaf in paths.flatten(tree).items()
    }


def check(ours: np.ndarray, theirs: np.ndarray, labels: list[int], correct: int) -> None:
    np.testing.assert_array_equal(top5(ours), top5(theirs))
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert sum(ours.argmax(-1) == labels) >= correct


def top5(logits: np.ndarray) -> np.ndarray:
    return np.argsort(-logits, axis=-1)[:, :5]


def test_torchvisions_mobilenet(folder):
    files, labels = zip(*photos(folder), strict=True)
    path = folder / "mobilenet_v2-b0353104.pth"
    preset = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1.transforms()
    model = torchvision.models.mobilenet_v2()
    model.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        batch = torch.stack([preset(Image.open(file).convert("RGB")) for file in files])
        theirs = model.eval()(batch).numpy()
    preprocessing = Preprocessing(**convert.read.torchvision_preprocessing(preset))
    check(our_logits(path, preprocessing, list(files)), theirs, list(labels), 18)


@pytest.mark.parametrize("number", LITE)
def test_efficientnet_lite(folder, number, tmp_path):
    # The reference is timm's network, which the export must fit strictly.
    size, digest = LITE[number]
    files, labels = zip(*photos(folder), strict=True)
    path = folder / f"efficientnet-lite{number}-{digest}.pth"
    weights = convert.read_weights(str(path), allow_pickle=True)
    family, arguments = convert.recognize(weights)
    preprocessing = Preprocessing(
        image_size=(size, size),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        crop_pct=0.875,
        crop_mode="center",
        interpolation="bicubic",
    )
    model = build_model(family, **arguments)
    flat = convert.import_weights(
        weights, references_target(model, jnp.zeros((1, size, size, 3))), arguments
    )
    table = table_for_export("timm", family, arguments)
    assert table.config(arguments)["architecture"] == f"tf_efficientnet_lite{number}"
    package.write_package(tmp_path / "timm", flat, family, arguments, to="timm")
    reference = references.rebuild(table, family, arguments, flat, None, tmp_path / "again")
    config = {"input_size": (3, size, size), "crop_pct": 0.875, "interpolation": "bicubic"}
    transform = timm.data.create_transform(**config, mean=(0.5,) * 3, std=(0.5,) * 3)
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        theirs = reference.module(batch).numpy()
    check(our_logits(path, preprocessing, list(files)), theirs, list(labels), 15)
