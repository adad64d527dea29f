"""vision_jax.load: a model from anywhere as pure functions, equal to what runs and imports give."""

import dataclasses
import os
import subprocess
import sys

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
from jax.test_util import check_grads
from PIL import Image

import vision_jax
from vision_jax import convert
from vision_jax.data.sources import read_source
from vision_jax.data.transforms import Preprocessing, eval_transform
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import build_model
from vision_jax.ops import position_embedding
from vision_jax.trees import lora, paths

RESNET = {"depths": (1, 1, 1, 1), "block": "basic", "widths": (8, 8, 16, 16), "stem_width": 8}
VIT = {"width": 16, "depth": 2, "num_heads": 2, "mlp_width": 32, "patch_size": 4}
RULES = [r"block_\d+/mlp/fc\d/kernel"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Random models of 5 classes, by family."""
    folder = tmp_path_factory.mktemp("files")
    return {
        "resnet": runs.write_teacher(folder / "resnet.safetensors", "resnet", 5, 32, **RESNET),
        "vit": runs.write_teacher(
            folder / "vit.safetensors", "vit", 5, 16, image_size=(16, 16), **VIT
        ),
    }


def photos(rng, count=3, side=20):
    return [rng.integers(0, 256, (side, side + 4, 3), dtype=np.uint8) for _ in range(count)]


def logits(loaded, images, variables=None):
    return np.asarray(jax.jit(loaded.apply)(variables or loaded.variables, images)["logits"])


def imported_logits(file, images):
    """By way of convert alone."""
    weights = convert.read_weights(file)
    family, arguments = convert.recognize(weights)
    model = build_model(family, **arguments)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    target = {path: leaf for tree in like.values() for path, leaf in paths.flatten(tree).items()}
    flat = convert.import_weights(weights, target, arguments)
    variables = {
        name: paths.unflatten(tree, {path: flat[path] for path in paths.flatten(tree)})
        for name, tree in like.items()
    }
    return np.asarray(jax.jit(model.apply)(variables, images))


def unsized(file):
    """The same weights in a file without a header."""
    path = f"{file}.bare.safetensors"
    convert.write_safetensors(path, dict(convert.read_weights(file).tensors), {})
    return path


# What is loaded -----------------------------------------------------------------------------------


@pytest.mark.long(but=("resnet",))
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_logits_are_those_of_an_import(files, family, rng):
    loaded = vision_jax.load(files[family])
    images = loaded.preprocess(photos(rng))
    expected = imported_logits(files[family], images)
    np.testing.assert_array_equal(logits(loaded, images), expected)
    assert len(np.unique(expected)) == expected.size
    assert loaded.class_names == ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3", "LABEL_4")
    assert loaded.new_paths == ()
    assert loaded.origin == files[family]
    assert ("batch_stats" in loaded.variables) == (family == "resnet")


def test_images_are_what_evaluation_sees(files, rng, tmp_path):
    loaded = vision_jax.load(files["vit"])
    array = photos(rng)[0]
    view = eval_transform(array, loaded.preprocessing).astype(np.float32) / 255
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path)
    turned = Image.fromarray(array).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    given = [path, str(path), array, Image.open(path), Image.open(tmp_path / "turned.png")]
    for one in given:
        np.testing.assert_array_equal(loaded.preprocess(one), view[None])
    several = loaded.preprocess(given)
    assert (several.dtype, several.shape) == (np.float32, (5, 16, 16, 3))
    np.testing.assert_array_equal(loaded.preprocess(np.stack([array, array])), several[:2])
    clear = Image.new("RGBA", (20, 20), (9, 9, 9, 0))  # transparent pixels lie on white
    np.testing.assert_array_equal(loaded.preprocess(clear), np.ones((1, 16, 16, 3)))


def test_a_workdir_is_its_run(rng):
    workdir = runs.finished()
    loaded = vision_jax.load(workdir)
    assert loaded.class_names == runs.CLASSES
    assert loaded.preprocessing == Preprocessing(
        (16, 16), (0.5, 0.4, 0.3), (0.3, 0.2, 0.25), 1.0, "bicubic", "center"
    )
    result = vision_jax.evaluate(
        loaded, loaded.variables, f"cifar10:{runs.inputs()}/test", batch_size=16
    )
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert result.summary["count"] == 20
    assert result.summary["top1"] == last["eval/top1"]
    assert result.summary["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)


def test_the_embedded_model():
    loaded = vision_jax.load("embedded:vit_cifar10")
    assert loaded.class_names[:2] == ("airplane", "automobile")
    assert loaded.preprocessing.image_size == (32, 32)
    blocks = [name for i in range(6) for name in (f"block_{i}/attention", f"block_{i}")]
    assert loaded.feature_names == ("embed", *blocks, "pooled")


@pytest.mark.long
def test_a_new_head(files, rng):
    whole = vision_jax.load(files["vit"])
    images = whole.preprocess(photos(rng))
    new = vision_jax.load(files["vit"], num_classes=3)
    assert new.class_names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert new.new_paths == ("head/bias", "head/kernel")
    assert logits(new, images).shape == (3, 3)
    kept, old = (paths.flatten(one.variables["params"]) for one in (new, whole))
    for path in old.keys() - set(new.new_paths):
        np.testing.assert_array_equal(kept[path], old[path])

    named = vision_jax.load(files["vit"], class_names=["a", "b", "c", "d", "e"])  # as many, others
    assert named.new_paths == new.new_paths
    assert vision_jax.load(files["vit"], class_names=whole.class_names).new_paths == ()

    bare = vision_jax.load(files["vit"], num_classes=0)
    assert bare.class_names == ()
    pooled = whole.features(whole.variables, images, ["pooled"])["pooled"]
    np.testing.assert_allclose(logits(bare, images), pooled, atol=1e-5)


def test_another_image_size_resamples_positions(files, rng):
    loaded, own = vision_jax.load(files["vit"], image_size=(24, 16)), vision_jax.load(files["vit"])
    images = loaded.preprocess(photos(rng))
    assert images.shape == (3, 24, 16, 3)
    assert logits(loaded, images).shape == (3, 5)
    before, after = (one.variables["params"]["pos_embed"] for one in (own, loaded))
    prefix = before.shape[1] - 16
    resampled = position_embedding.resample_positions(
        np.asarray(before), (4, 4), (6, 4), num_prefix=prefix
    )
    np.testing.assert_array_equal(after, resampled)
    with pytest.raises(UserError, match="nothing says how large its images are: give image_size"):
        vision_jax.load(unsized(files["resnet"]))
    assert vision_jax.load(unsized(files["resnet"]), image_size=48).preprocessing.crop_pct == 0.875


def test_names_of_the_zoo_are_addresses_of_their_weights(monkeypatch):
    asked = []

    def read_weights(spec, **_):
        asked.append(spec)
        raise UserError("enough")

    monkeypatch.setattr(convert, "read_weights", read_weights)
    for name in ("timm/resnet50.a1_in1k", "timm://resnet50", "torchvision/resnet50"):
        with pytest.raises(UserError, match="enough"):
            vision_jax.load(name)
    assert asked == ["timm://resnet50.a1_in1k", "timm://resnet50", "torchvision://resnet50"]


# Pure functions -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_apply_under_jit_and_vmap(files, family, rng):
    loaded = vision_jax.load(files[family])
    images = loaded.preprocess(photos(rng))
    expected = logits(loaded, images)
    np.testing.assert_allclose(
        jax.jit(loaded.apply)(loaded.variables, images)["logits"], expected, atol=1e-5
    )

    def one(variables, image):
        return loaded.apply(variables, image[None])["logits"][0]

    each = jax.vmap(one, (None, 0))(loaded.variables, images)
    np.testing.assert_allclose(each, expected, atol=1e-5)
    two = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), loaded.variables)  # an ensemble
    both = jax.vmap(loaded.apply, (0, None))(two, images)["logits"]
    np.testing.assert_allclose(both[0], expected, atol=1e-5)
    assert (abs(both[1] - both[0]) > 1e-3).any()


@pytest.mark.long
def test_gradients_in_float64_are_those_of_differences(files, rng):
    single = vision_jax.load(files["vit"])
    images = single.preprocess(photos(rng, count=2))
    with jax.enable_x64(True):
        loaded = vision_jax.load(files["vit"], dtype="float64")
        assert {x.dtype for x in jax.tree.leaves(loaded.variables)} == {np.dtype(np.float64)}
        exact = logits(loaded, images.astype(np.float64))
        np.testing.assert_allclose(logits(single, images), exact, rtol=1e-4, atol=1e-4)

        loss = jax.jit(lambda variables, images: loaded.apply(variables, images)["logits"])
        arguments = loaded.variables, jnp.asarray(images, jnp.float64)
        # A direction through thousands of parameters is long: steps of it are short.
        check_grads(loss, arguments, order=1, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-6)


@pytest.mark.long
def test_training_gives_the_next_statistics(files, rng):
    loaded = vision_jax.load(files["resnet"])
    images = loaded.preprocess(photos(rng))
    before = loaded.variables["batch_stats"]
    outputs = jax.jit(loaded.apply, static_argnames="train")(loaded.variables, images, train=True)
    assert jax.tree.structure(outputs["batch_stats"]) == jax.tree.structure(before)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), outputs["batch_stats"], before)
    assert all(jax.tree.leaves(changed))
    after = {**loaded.variables, "batch_stats": outputs["batch_stats"]}
    assert (logits(loaded, images, after) != logits(loaded, images)).any()
    assert set(loaded.apply(loaded.variables, images)) == {"logits"}


@pytest.mark.long
def test_a_key_decides_what_is_random_in_training(files, rng):
    loaded = vision_jax.load(files["vit"])
    images = loaded.preprocess(photos(rng))
    noisy = dataclasses.replace(loaded, model=loaded.model.clone(dropout=0.5))

    @jax.jit
    def apply(key):
        return noisy.apply(noisy.variables, images, train=True, key=key)["logits"]

    def trained(number):
        return np.asarray(apply(jax.random.key(number)))

    np.testing.assert_array_equal(trained(0), trained(0))
    assert (trained(0) != trained(1)).any()
    np.testing.assert_array_equal(logits(noisy, images), logits(loaded, images))


@pytest.mark.long
def test_features_and_pyramid(files, rng):
    loaded = vision_jax.load(files["resnet"], num_classes=0, image_size=(64, 96))
    images = loaded.preprocess(photos(rng))
    pyramid = jax.jit(loaded.pyramid)(loaded.variables, images)
    assert {stride: x.shape for stride, x in pyramid.items()} == {
        4: (3, 16, 24, 8),
        8: (3, 8, 12, 8),
        16: (3, 4, 6, 16),
        32: (3, 2, 3, 16),
    }
    _, everything = loaded.model.apply(loaded.variables, images, return_features=True)
    assert set(everything) == set(loaded.feature_names)
    for (name, _), found in zip(loaded.model.pyramid, pyramid.values(), strict=True):
        np.testing.assert_allclose(found, everything[name], atol=1e-5)

    vit = vision_jax.load(files["vit"])
    seen = vit.preprocess(photos(rng))
    found = vit.features(vit.variables, seen, vit.feature_names)
    assert tuple(found) == vit.feature_names
    np.testing.assert_allclose(found["block_0/attention"].sum(-1), 1, atol=1e-5)
    with pytest.raises(UserError, match="one scale and no pyramid: take features of embed, block"):
        vit.pyramid(vit.variables, seen)


# Detectors ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    path = tmp_path_factory.mktemp("detector") / "model.safetensors"
    return vision_jax.load(detection_runs.write_detector(path))


@pytest.mark.long
def test_a_detector_finds_the_same_beside_images_of_other_shapes(detector, rng):
    wide, high = (
        rng.integers(0, 256, shape, dtype=np.uint8) for shape in ((30, 60, 3), (50, 40, 3))
    )
    both = detector.preprocess([wide, high])
    assert isinstance(both, vision_jax.Padded)
    assert both.sizes.tolist() == [[30, 60], [50, 40]]
    assert (both.images[~both.pixel_mask] == 0).all()
    rows, columns = np.nonzero(both.pixel_mask[0])
    assert (rows.max() + 1) * 2 == columns.max() + 1  # the aspect ratio is kept

    def find(padded):
        outputs = jax.jit(detector.apply)(detector.variables, *padded[:2])
        return detector.postprocess(outputs, padded.sizes)

    together = find(both)
    assert together["boxes_xyxy_px"].shape == (2, 8, 4)
    for row, image in enumerate((wide, high)):
        alone = find(detector.preprocess(image))
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][row], value[0], rtol=1e-4, atol=1e-3)
    unmasked = jax.jit(detector.apply)(detector.variables, both.images)
    assert (
        abs(detector.postprocess(unmasked, both.sizes)["score"] - together["score"]) > 1e-5
    ).any()


@pytest.mark.long
def test_a_detector_is_evaluated_on_annotations(detector):
    data = detection_runs.data() / "test"
    names = tuple(read_names(data / "test.json"))
    loaded = dataclasses.replace(detector, class_names=names)
    result = vision_jax.evaluate(loaded, loaded.variables, data / "test.json", images=data)
    assert result.summary["count"] == 9
    assert 0 <= result.summary["ap"] <= 1


def read_names(annotations):
    from vision_jax.data.detection import read_detection_source

    return read_detection_source(str(annotations), str(annotations.parent)).class_names


@pytest.mark.long
def test_a_detector_on_squares(detector, tmp_path, rng):
    path = detection_runs.write_detector(tmp_path / "detector.safetensors")
    square = vision_jax.load(path, image_size=32, num_classes=2)
    images, pixel_mask, _ = square.preprocess(photos(rng))
    assert images.shape == (3, 32, 32, 3)
    assert pixel_mask.all()
    outputs = jax.eval_shape(square.apply, square.variables, images)
    assert outputs["logits"].shape == (2, 3, 8, 3)
    assert square.new_paths == ("class_head/bias", "class_head/kernel")
    other = vision_jax.load(path, image_size=32, num_classes=2, key=jax.random.key(1))
    kernel, drawn_else = (
        one.variables["params"]["class_head"]["kernel"] for one in (square, other)
    )
    assert (kernel != drawn_else).any()
    with pytest.raises(UserError, match="a detector takes squares; give one number"):
        vision_jax.load(path, image_size=(32, 48))


# Out again ----------------------------------------------------------------------------------------


def test_adapters_train_and_go_out(files, rng, tmp_path):
    loaded = vision_jax.load(files["vit"], num_classes=2)
    images, labels = loaded.preprocess(photos(rng, count=4)), np.array([0, 1, 0, 1])
    params = lora.attach(
        loaded.variables["params"], RULES, key=jax.random.key(0), rank=2, alpha=2.0
    )
    chosen = lora.adapter_paths(params) | set(loaded.new_paths)
    trainable, frozen = paths.partition(paths.flatten(params), chosen)
    tx = optax.adam(1e-2)

    @jax.jit
    def step(trainable, opt_state, frozen):
        def loss_fn(trainable):
            variables = {"params": paths.unflatten(params, {**trainable, **frozen})}
            found = loaded.apply(variables, images, train=True)["logits"]
            return optax.losses.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        loss, gradient = jax.value_and_grad(loss_fn)(trainable)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(trainable, updates), opt_state, loss

    opt_state, losses = tx.init(trainable), []
    for _ in range(10):
        trainable, opt_state, loss = step(trainable, opt_state, frozen)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    tuned = {"params": paths.unflatten(params, {**trainable, **frozen})}
    expected = logits(loaded, images, tuned)

    vision_jax.export_adapter(tmp_path / "adapter", loaded, tuned["params"], trained=trainable)
    read = vision_jax.import_adapter(tmp_path / "adapter", loaded)
    np.testing.assert_allclose(logits(loaded, images, {"params": read}), expected, atol=1e-5)

    written = vision_jax.save(tmp_path / "merged", loaded, tuned)
    assert [path.name for path in written] == ["model.safetensors", "config.json"]
    again = vision_jax.load(tmp_path / "merged")
    assert again.class_names == loaded.class_names
    np.testing.assert_array_equal(again.preprocess(photos(rng)).shape, (3, 16, 16, 3))
    np.testing.assert_allclose(logits(again, images), expected, atol=1e-5)


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_classes": -1}, "num_classes -1: give 1 or more, or 0 to leave the head out"),
        ({"num_classes": 2.5}, "num_classes 2.5: give 1 or more"),
        ({"num_classes": 2, "class_names": ["a"]}, "num_classes 2 and 1 class_names: give one"),
        ({"class_names": "abc"}, "class_names 'abc' is one text: give a list of names"),
        ({"image_size": (1, 2, 3)}, "give pixels a side, or"),
        ({"image_size": 0}, "image_size 0: give pixels a side"),
        ({"dtype": "int8"}, "dtype 'int8' is none of float32, bfloat16, float64"),
        ({"dtype": "float64"}, "dtype float64: first call jax.config.update"),
    ],
)
def test_arguments_that_make_no_sense(files, arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        vision_jax.load(files["vit"], **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "said"),
    [
        ([], "no images given"),
        (3, "<class 'int'> is no path, PIL image or uint8 array"),
        (
            np.zeros((4, 4, 3)),
            r"float64\[4, 4, 3\] is no path, .* floats in \[0, 1\] .* go to apply",
        ),
        (np.zeros((0, 4, 3), np.uint8), "an empty image"),
        (np.zeros((4, 4, 5), np.uint8), "5 channels and the model takes 3"),
        ("none.png", "none.png: can't be read"),
    ],
)
def test_what_is_no_image(files, images, said):
    with pytest.raises(UserError, match=said):
        vision_jax.load(files["vit"]).preprocess(images)


def test_what_is_not_there(files, tmp_path):
    running = tmp_path / "running"
    running.mkdir()
    (running / "model.json").write_text("{}")
    for name, said in (
        (tmp_path / "none", "no such file or folder"),
        ("embedded:vit", "only fashion_generator, nanodet_coco, vit_cifar10"),
        ("timm/resnet5", "timm/resnet5 is not in the zoo: did you mean timm/resnet50"),
        ("hf://facebook", "write hf://owner/name"),
        (running, "this run has not written its model yet: let it end, or write what its last"),
    ):
        with pytest.raises(UserError, match=said):
            vision_jax.load(name)
    loaded = vision_jax.load(files["vit"])
    with pytest.raises(UserError, match="is a classifier: take the softmax"):
        loaded.postprocess({}, [])
    with pytest.raises(UserError, match="no adapter to write"):
        vision_jax.export_adapter(tmp_path / "adapter", loaded, loaded.variables["params"])
    assert read_source("embedded:fashion_mnist/test").class_names != loaded.class_names
    with pytest.raises(UserError, match="class"):
        vision_jax.evaluate(loaded, loaded.variables, "embedded:fashion_mnist/test")


def test_a_size_of_which_the_model_would_not_see_all_is_refused(files, tmp_path):
    said = "image_size: of 63 pixels a vit with patches of 4 would not see the last 3: .* 60 or 64"
    with pytest.raises(UserError, match=said):
        vision_jax.load(files["vit"], image_size=63)
    assert vision_jax.load(files["resnet"], image_size=63).preprocessing.image_size == (63, 63)
    # Weights keep the size that they come with: SigLIP's so400m has patches of 14 and 384 pixels.
    own = runs.write_teacher(
        tmp_path / "own.safetensors", "vit", 5, 18, image_size=(18, 18), **{**VIT, "depth": 1}
    )
    assert vision_jax.load(own, image_size=18).model.image_size == (18, 18)


def test_the_package_alone_is_light():
    program = (
        "import sys, vision_jax\n"
        "assert 'load' in dir(vision_jax) and 'jax' not in sys.modules\n"
        "assert 'numpy' not in sys.modules\n"
        "try: vision_jax.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(runs.ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert child.stdout == "module 'vision_jax' has no attribute 'nothing'\n"


@pytest.mark.long
def test_bytes_are_images_too_and_a_model_is_shown_in_a_line(files, rng):
    loaded = vision_jax.load(files["vit"])
    images = rng.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    floats, name = images / np.float32(255), loaded.feature_names[-1]
    found, wanted = (
        (logits(loaded, x), loaded.features(loaded.variables, x, [name])[name])
        for x in (images, floats)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    assert len(repr(loaded)) < 2000


@pytest.mark.parametrize("weights", ["", None])
def test_no_weights_are_one_line(weights):
    with pytest.raises(UserError, match="name weights"):
        vision_jax.load(weights)


@pytest.mark.parametrize("image_size", ["64", 64.0, (16, 16, 3), 0])
def test_a_size_that_is_none_is_one_line(files, image_size):
    with pytest.raises(UserError, match="give pixels a side"):
        vision_jax.load(files["vit"], image_size=image_size)
