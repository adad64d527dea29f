"""Segmentation runs: resume, devices, micro-batches, recipes, windows, predictions, attacks."""

import dataclasses
import json

import detection_runs
import jax
import numpy as np
import pytest
import runs
import segmentation_runs
from PIL import Image
from segmentation_runs import CLASSES, tiny_config

import vision_jax
from vision_jax import convert, sharding, steps, train
from vision_jax.commands import evaluate, predict, robustness
from vision_jax.commands.convert import main as convert_main
from vision_jax.config import load_config
from vision_jax.data.pipeline import DamageLog
from vision_jax.data.segmentation_transforms import segmentation_eval_transform
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.main import main
from vision_jax.ops.resize import resize_bilinear
from vision_jax.run.prepare import Run
from vision_jax.run.restore import restore
from vision_jax.tasks.segmentation.cases import SENTENCE
from vision_jax.tasks.segmentation.metrics import confusion_matrix
from vision_jax.tasks.segmentation.pixels import Evaluation
from vision_jax.tasks.segmentation.task import read_sources

RESNET = (("depths", (1,)), ("block", "basic"), ("widths", (4,)), ("stem_width", 4))


@pytest.fixture(scope="module")
def finished():
    return segmentation_runs.finished()


def test_a_run_leaves_its_numbers_pictures_and_model(finished):
    summary = json.loads((finished / "evaluation.json").read_text())
    assert summary["count"] == 5
    assert list(summary["per_class"]) == list(CLASSES)
    assert 0 < summary["pixel_accuracy"] <= 1
    for name in ("predictions.png", "confusion.png", "curves.png", "model.safetensors"):
        assert (finished / name).stat().st_size > 1000
    records = read_metrics(finished / "metrics.jsonl")
    assert sum("eval/miou" in record for record in records) == 2
    for record in (record for record in records if "train/loss" in record):
        terms = record["train/pixel_loss"] + record["train/dice_loss"]
        np.testing.assert_allclose(record["train/loss"], terms, rtol=1e-4)
    found = convert.read_weights(str(finished / "model.safetensors"))
    assert convert.recognize(found)[0] == "unet"
    assert tuple(found.preprocessing["image_size"]) == (16, 16)
    assert tuple(convert.class_names_of(found)) == CLASSES


@pytest.mark.long
def test_resume_is_bit_identical_with_one_program(tmp_path, monkeypatch):
    config = tiny_config()
    made, make = [], Run.make_train_step
    monkeypatch.setattr(Run, "make_train_step", lambda run: made.append(make(run)) or made[-1])
    assert train.run(config, tmp_path / "once") == 0
    with pytest.MonkeyPatch.context() as stop:
        stop.setattr(Evaluation, "line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "twice")
    assert train.run(config, tmp_path / "twice") == 0
    states = [restore(config, tmp_path / name, "last").state for name in ("once", "twice")]
    jax.tree.map(np.testing.assert_array_equal, *jax.device_get(states))
    assert [step._cache_size() for step in made] == [1, 1, 1]


def interrupt(self):
    raise KeyboardInterrupt


@pytest.mark.long
def test_the_same_step_on_one_and_on_eight_devices():
    losses = []
    for devices in (1, 8):
        prepared = runs.Prepared(devices=devices, fsdp=devices, config=tiny_config())
        _, metrics = prepared.step(prepared.state, prepared.frozen, prepared.batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("balance", ["none", "frequency"])
def test_accumulation_is_the_larger_batch(balance):
    """Gradients and loss, whatever each micro-batch ignores; norms are frozen for it."""
    fields = {
        "model__freeze_norm": True,
        "optim__clip_norm": 0.0,
        "loss__focal_gamma": 1.5,
        "loss__balance": balance,
    }
    found = []
    for accumulate in (1, 4):
        config = tiny_config(**fields, optim__accumulate=accumulate)
        prepared = runs.Prepared(config=config)
        label = np.array(prepared.batch["label"])
        label[::3, :9] = 255  # so that micro-batches count different numbers of pixels
        place = sharding.make_batch_placer(prepared.run.mesh)
        batch = place({**jax.device_get(prepared.batch), "label": label})
        _, metrics = prepared.step(prepared.state, prepared.frozen, batch)
        found.append(jax.device_get(metrics))
    for name in ("loss", "grad_norm", "pixel_loss", "dice_loss", "pixel_accuracy"):
        np.testing.assert_allclose(found[1][name], found[0][name], rtol=1e-5, err_msg=name)


@pytest.mark.long
def test_recipes_compose(finished, tmp_path):
    """Adapters on the encoder's convolutions, a teacher of pixels and an attack, averaged."""
    config = tiny_config(
        recipes=("lora", "distill", "adversarial"),
        model__freeze_norm=True,
        trainable=("class_head/.*",),
        lora__rules=("backbone/.*kernel",),
        lora__rank=2,
        distill__teachers=(str(finished),),
        adversarial__steps=1,
        optim__accumulate=2,
        batch_size=16,
        total_steps=2,
        evaluate__every=2,
    )
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    assert "backbone/stage_0/conv1/conv/kernel/base" in restored.frozen
    assert "backbone/stage_0/conv1/conv/kernel/b" in restored.state.trainable
    records = read_metrics(tmp_path / "metrics.jsonl")
    taught = [r["train/taught_soft"] for r in records if "train/taught_soft" in r]
    assert np.isfinite(taught).all()
    assert min(taught) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss__class_weights": (1.0, 2.0)}, "2 for 3 classes"),
        ({"loss__class_weights": (1.0,) * 3, "loss__balance": "frequency"}, "two ways to weigh"),
        ({"loss__pixel_weight": 0.0, "loss__dice_weight": 0.0}, "nothing to minimize"),
        ({"model__variant": "resnet", "model__arguments": RESNET}, "take a segmenter"),
        ({"evaluate__background": "sky"}, "config.evaluate.background 'sky': there is no such"),
        ({"evaluate__window": 16, "evaluate__stride": 17}, "would leave pixels out"),
        ({"evaluate__window": 16, "data__view": "squash"}, "set config.data.view=original"),
        ({"model__image_size": 0}, "set config.model.image_size"),
        ({"recipes": ("adversarial",), "adversarial__method": "trades"}, "use pgd"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.run(tiny_config(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)


def test_evaluation_depends_on_no_batch_and_windows_see_what_images_do(finished):
    """Windows as large as the images, or in one batch as alone; smaller ones come close."""
    found = {}
    for name, changes in {
        "whole": {},
        "one by one": {"evaluate__batch_size": 1},
        "windows as large": {"evaluate__window": 48},
        "windows": {"evaluate__window": 16, "evaluate__stride": 8},
    }.items():
        config = tiny_config(**changes)
        restored = restore(config, finished, "last")
        source = restored.run.task.read_eval_source(config, CLASSES)
        found[name] = restored.run.make_evaluate(source)(*restored.trained.arguments).confusion
    np.testing.assert_array_equal(found["one by one"], found["whole"])
    assert found["windows"].sum() == found["whole"].sum()
    same = np.abs(found["windows"] - found["whole"]).sum() / found["whole"].sum()
    assert same < 0.2


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {"evaluate__window": 16, "evaluate__stride": 8, "evaluate__batch_size": 8},
        {"data__view": "windows", "evaluate__batch_size": 8},
    ],
    ids=["by stride", "spread"],
)
def test_windows_of_two_processes_are_those_of_one(tmp_path, fields):
    """Each process has half of a batch of windows, on two devices: the numbers are the same."""
    config = tiny_config(**fields)
    workdir = tmp_path / "two"
    overrides = segmentation_runs.overrides(**fields)
    children = runs.start_two(segmentation_runs.CONFIG.name, workdir, overrides, devices=2)
    screens = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], screens
    two = json.loads((workdir / "evaluation.json").read_text())
    restored = restore(config, workdir, "last")
    source = restored.run.task.read_eval_source(config, CLASSES)
    one = restored.run.make_evaluate(source)(*restored.trained.arguments).summary
    assert two["pixels"] == one["pixels"]
    for name, found in one["per_class"].items():
        assert two["per_class"][name]["iou"] == pytest.approx(found["iou"], abs=2e-3), name


def test_images_of_one_size_compile_the_model_once_whatever_their_masks(finished, monkeypatch):
    """With the view squash, of two sizes of masks; the numbers are those of a model by hand."""
    config = tiny_config(data__view="squash", evaluate__batch_size=8)
    restored = restore(config, finished, "last")
    run = dataclasses.replace(
        restored.run.description.preprocessing, view="squash", image_size=(24, 24)
    )
    source = restored.run.task.read_eval_source(config, CLASSES)
    made, make = [], steps.make_eval_step
    monkeypatch.setattr(
        steps,
        "make_eval_step",
        lambda *args, **named: made.append(make(*args, **named)) or made[-1],
    )
    task, outputs_fn = restored.run.task, restored.run.outputs_fn
    evaluate_all = task.make_evaluate(config, outputs_fn, restored.run.mesh, source, run)
    found = evaluate_all(*restored.trained.arguments).confusion
    assert [step._cache_size() for step in made] == [1, 2]
    params = restored.run.parameters.assemble({**restored.trained.arguments[0], **restored.frozen})
    apply = jax.jit(restored.trained.apply, static_argnames="train")
    expected = np.zeros((3, 3), np.int64)
    for i in range(len(source)):
        image = segmentation_eval_transform(source[i]["image"], run)[None] / np.float32(255)
        state = restored.trained.arguments[2]
        outputs, _ = apply(params, state, image, train=False, keys={})
        label = source[i]["mask"]
        scores = resize_bilinear(outputs["logits"], label.shape)
        expected += confusion_matrix(np.asarray(scores[0]).argmax(-1), label, 3)
    assert np.abs(found - expected).sum() <= 2  # ties of rounding


def test_predict_writes_masks_of_the_images_own_size(finished, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (24, 32)), ("b.png", (17, 40))):
        image, _ = segmentation_runs.draw_scene(rng, size)
        Image.fromarray(image).save(photos / name)
    (photos / "c.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict.run(tiny_config(), finished, "last", [str(photos)], out) == 0
    record = json.loads((out / "predictions.json").read_text())
    assert record["classes"] == {str(k): name for k, name in enumerate(CLASSES)}
    errors = [entry.get("error") for entry in record["images"]]
    assert errors[:2] == [None, None]
    assert errors[2].startswith(f"{photos / 'c.png'}: not a readable image")
    *said, skipped = capsys.readouterr().out.splitlines()[:3]
    assert skipped == f"skipped a damaged image: {errors[2]}"
    for line, entry in zip(said, record["images"], strict=False):  # though sizes are grouped
        assert line.startswith(entry["file"])
        name, share = max(entry["shares"].items(), key=lambda one: one[1])
        assert line.removeprefix(entry["file"]).split(",")[0].split() == [name, f"{share:.1%}"]
    for entry, size in zip(record["images"], ((24, 32), (17, 40)), strict=False):
        mask = Image.open(out / entry["mask"])
        assert mask.mode == "P"
        values = np.asarray(mask)
        assert values.shape == size
        shares = [(values == k).mean() for k in range(3)]
        np.testing.assert_allclose(list(entry["shares"].values()), shares)
        assert np.asarray(Image.open(out / entry["mask"].replace("masks", "overlays"))).shape == (
            *size,
            3,
        )
    assert "objects" in record["images"][0]
    with pytest.raises(
        UserError, match=r"not one of its 1 images .* first .*c\.png: not a readable"
    ):
        predict.run(tiny_config(), finished, "last", [str(photos / "c.png")], out)


def test_a_run_in_python(finished, rng):
    """As a notebook loads it: images, logits, a mask of their own size, numbers over a set."""
    loaded = vision_jax.load(finished)
    image, _ = segmentation_runs.draw_scene(rng, (24, 32))
    seen = loaded.preprocess([image])
    assert seen.shape == (1, 24, 32, 3)
    outputs = jax.jit(loaded.apply)(loaded.variables, seen)
    found = loaded.postprocess(outputs, [(48, 64)])
    assert found["scores"].shape == (1, 48, 64, 3)
    assert found["label"].dtype == np.int32
    result = vision_jax.evaluate(
        loaded, loaded.variables, segmentation_runs.data() / "test", batch_size=2
    )
    summary = json.loads((finished / "evaluation.json").read_text())
    assert result.summary["miou"] == pytest.approx(summary["miou"], abs=1e-3)
    with pytest.raises(UserError, match="of different sizes"):
        loaded.preprocess([image, image[:20]])
    with pytest.raises(UserError, match="masks of several sizes"):
        loaded.postprocess(outputs, [(48, 64), (24, 32)])


@pytest.mark.long
def test_robustness_falls_with_epsilon(finished, tmp_path, capsys):
    config = tiny_config(
        robustness__epsilons=(0.02, 0.3), robustness__steps=2, robustness__batch_size=1
    )
    assert robustness.run(config, finished, "last") == 0
    record = json.loads((finished / "robustness.json").read_text())
    assert record["images"] == 5
    for rows in record["attacks"].values():
        assert rows[-1]["pixel_accuracy"] < record["clean"]["pixel_accuracy"]
        assert [row["largest"] <= row["epsilon"] + 1e-6 for row in rows] == [True, True]
    capsys.readouterr()


@pytest.mark.long
def test_evaluate_reprints_the_numbers_of_training(finished, capsys):
    assert evaluate.run(tiny_config(), finished, "last") == 0
    records = read_metrics(finished / "metrics.jsonl")
    last = [record for record in records if "eval/miou" in record][-1]
    assert f"miou {last['eval/miou']:.4f}" in capsys.readouterr().out


def test_a_value_that_is_no_class_stops_the_run(tmp_path):
    folder = tmp_path / "data"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(2):
        Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "images" / f"{i}.png")
        Image.fromarray(np.full((20, 20), 9, np.uint8)).save(folder / "masks" / f"{i}.png")
    (folder / "classes.json").write_text('["a", "b"]')
    config = tiny_config(data__train=folder, data__eval="", data__holdout=0.5)
    config.evaluate.background = config.evaluate.objects = ""
    with pytest.raises(UserError, match=r"png: 400 pixels of the value 9, which .*classes.json"):
        train.run(config, tmp_path / "run")


def test_batches_are_a_function_of_seed_and_step():
    config = tiny_config()
    task = runs.find_task("segmentation")
    source, _ = task.read_sources(config)
    preprocessing = task.load_preprocessing(
        {"image_size": (16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    )

    def take(first, threads):
        config.data.threads = threads
        batches = task.training_data(config, source, preprocessing, DamageLog(), first)
        return [next(batches) for _ in range(4 - first)]

    once, later = take(0, 1), take(2, 3)
    for ours, theirs in zip(once[2:], later, strict=True):
        for name in ours:
            np.testing.assert_array_equal(ours[name], theirs[name])
    shapes = task.batch_shapes(config, preprocessing)
    assert {n: (x.shape, x.dtype) for n, x in once[0].items()} == {
        n: (x.shape, x.dtype) for n, x in shapes.items()
    }


ENCODER = {"depths": (1, 1), "block": "basic", "widths": (8, 12), "stem_width": 8}


@pytest.mark.long(but=("segmentation",))
@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_classifier_is_the_backbone(task, tmp_path):
    """Its head is left out, and whatever is not the backbone begins at random."""
    path = runs.write_teacher(tmp_path / "resnet.safetensors", "resnet", 7, 32, **ENCODER)
    if task == "segmentation":
        arguments = (("encoder", "resnet"), ("encoder_arguments", tuple(ENCODER.items())),
                     ("decoder_widths", (8, 6, 4)))  # fmt: skip
        config = tiny_config(model__weights=path, model__variant="unet", model__arguments=arguments)
    else:
        arguments = dict(detection_runs.FCOS["model__arguments"]) | ENCODER
        config = detection_runs.tiny_config(
            **detection_runs.FCOS
            | {"model__weights": path, "model__arguments": tuple(arguments.items())},
            model__reinitialize=("class_head/.*",),
            model__dropout=0.0,
        )
    prepared = runs.Prepared(config=config)
    tensors = convert.read_weights(path).tensors
    theirs = np.asarray(tensors["layer1.0.conv1.weight"]).transpose(2, 3, 1, 0)
    kernel = "backbone/stage_0/block_0/conv1/kernel"
    np.testing.assert_array_equal({**prepared.state.trainable, **prepared.frozen}[kernel], theirs)
    variance = prepared.state.model_state["backbone"]["bn1"]["var"]
    np.testing.assert_array_equal(variance, tensors["bn1.running_var"])
    assert prepared.run.description.preprocessing.mean == (0.4, 0.5, 0.6)


def test_a_backbone_of_other_sizes_is_refused(tmp_path):
    path = runs.write_teacher(tmp_path / "resnet.safetensors", "resnet", 7, 32, **ENCODER)
    arguments = (("encoder", "resnet"), ("decoder_widths", (8, 6, 4)), (
        "encoder_arguments", tuple((ENCODER | {"widths": (8, 16)}).items())))  # fmt: skip
    config = tiny_config(model__weights=path, model__variant="unet", model__arguments=arguments)
    with pytest.raises(UserError, match="stage_1") as error:
        runs.Prepared(config=config)
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_a_run_on_slices_reports_its_volumes(tmp_path, rng, capsys):
    nibabel = pytest.importorskip("nibabel")
    folder = segmentation_runs.volumes(tmp_path / "data", rng)
    parts = {part: f"volumes:{folder}?slices={part}" for part in ("0:7", "8:12")}
    changes = {"data.train": parts["0:7"], "data.eval": parts["8:12"]}
    changes |= {"evaluate.background": "", "evaluate.objects": ""}
    config = tiny_config(**changes)
    workdir = tmp_path / "run"
    train.run(config, workdir)
    files = sorted(path.name for path in (workdir / "cases").iterdir())
    assert files == ["0000_p0.json", "0000_p0.png", "0001_p1.json", "0001_p1.png"]
    report = json.loads((workdir / "cases/0001_p1.json").read_text())
    assert report["warning"] == SENTENCE
    assert report["slices"] == [8, 11]
    assert report["classes"]["ball"]["true_volume_ml"] > 0
    window = json.loads((workdir / "evaluation.json").read_text())["best_window"]
    assert window["iou"] > 0.9
    assert "the best one on the training slices" in " ".join(capsys.readouterr().out.split())
    # And on a volume of its own, which is stored from head to feet and back to front.
    image = nibabel.load(folder / "images/p0.nii.gz")
    turned = image.as_reoriented([[1, -1], [0, 1], [2, -1]])
    nibabel.save(turned, tmp_path / "turned.nii.gz")
    out = tmp_path / "out"
    for name in (folder / "images/p0.nii.gz", tmp_path / "turned.nii.gz"):
        saved = load_config(str(workdir / "config.json"), {})
        assert predict.run(saved, workdir, "last", [str(name)], out / name.stem) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "not a diagnosis" in told
    plain, other = (
        nibabel.load(next((out / name / "masks").iterdir())) for name in ("p0.nii", "turned.nii")
    )
    assert other.shape == turned.shape
    assert np.array_equal(other.affine, turned.affine)
    again = other.as_reoriented(nibabel.orientations.io_orientation(other.affine))
    assert np.array_equal(np.asarray(again.dataobj), np.asarray(plain.dataobj))
    report = json.loads(next((out / "p0.nii/cases").glob("*.json")).read_text())
    count = int((np.asarray(plain.dataobj) == 1).sum())
    assert report["classes"]["ball"]["voxels"] == count
    assert "true_voxels" not in report["classes"]["ball"]
    series = write_series(tmp_path / "series", np.asarray(image.dataobj))
    given = ["predict", f"--workdir={workdir}", "--checkpoint=last", f"--out={out / 'series'}"]
    assert main([*given, "--images", str(series)]) == 0
    assert "not a diagnosis" in " ".join(capsys.readouterr().out.split())
    labels = nibabel.load(next((out / "series/masks").glob("*.nii.gz")))
    same = nibabel.as_closest_canonical(labels)
    assert np.array_equal(np.asarray(same.dataobj), np.asarray(plain.dataobj))
    np.testing.assert_allclose(same.affine, plain.affine, atol=1e-6)
    assert json.loads(next((out / "series/cases").glob("*.json")).read_text())["patient"]
    saved.data.train = "embedded:nuclei/train"
    with pytest.raises(UserError, match="trained on images"):
        predict.run(saved, workdir, "last", [str(name)], out / "x")


def write_series(folder, voxels):
    """A folder of DICOM with the voxels [x, y, z] of `segmentation_runs.volumes`, where those are.

    Its axes go to the right, front and head, and DICOM's to the left, back and head.
    """
    dicom_files = pytest.importorskip("dicom_files")
    place = {"PixelSpacing": [2.0, 1.0], "ImageOrientationPatient": [-1, 0, 0, 0, -1, 0]}
    for z in range(voxels.shape[2]):
        at = {"ImagePositionPatient": [0, 0, 3.0 * z], "InstanceNumber": z + 1}
        array = np.ascontiguousarray(voxels[:, :, z].T)
        dicom_files.dicom(folder / f"{z:03}.dcm", array, PatientID="p", **place, **at)
    return folder


def test_a_config_of_files_of_regions(tmp_path):
    """The images lie where data.images says, those of evaluation where data.eval_images says."""
    folder = segmentation_runs.data()
    specs = {}
    for split, name in (("train", "00.png"), ("test", "01.png")):
        with Image.open(folder / split / "images" / name) as image:
            width, height = image.size
        content = {
            "images": [{"id": 1, "file_name": name, "width": width, "height": height}],
            "annotations": [
                {"image_id": 1, "category_id": 1, "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
            ],
            "categories": [{"id": 1, "name": "disc"}],
        }
        specs[split] = tmp_path / f"{split}.json"
        specs[split].write_text(json.dumps(content))
    changes = {"data.train": specs["train"], "data.eval": specs["test"]}
    changes |= {"data.images": folder / "train/images", "evaluate.background": "background"}
    changes |= {"data.eval_images": folder / "test/images"}
    for source in read_sources(tiny_config(**changes)):
        assert source.class_names == ("background", "disc")
        assert source[0]["mask"].sum() == 81
        assert source[0]["image"].shape[:2] == source[0]["mask"].shape


def test_a_unet_goes_to_smp_by_name(tmp_path):
    """The tensors come back as they were; another encoder's go nowhere, which one line says."""
    arguments = {"encoder": "resnet", "encoder_arguments": tuple(ENCODER.items()),
                 "decoder_widths": (8, 6, 4)}  # fmt: skip
    path = runs.write_teacher(tmp_path / "unet.safetensors", "unet", 3, 32, **arguments)
    assert convert_main([path, f"--out={tmp_path / 'smp'}", "--to=smp"]) == 0
    found, given = (
        convert.read_weights(str(place)).tensors
        for place in (tmp_path / "smp" / "model.safetensors", path)
    )
    assert set(found) == set(given)
    for name, tensor in given.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_a_plain_unet_goes_to_no_library(tmp_path, capsys):
    arguments = {"encoder": "plain", "encoder_arguments": (("widths", (4, 6)),),
                 "decoder_widths": (4,)}  # fmt: skip
    path = runs.write_teacher(tmp_path / "unet.safetensors", "unet", 3, 16, **arguments)
    assert convert_main([path, "--dry-run"]) == 2
    message = "smp has no unet that is such a model, and nor has any other library"
    screen = capsys.readouterr()
    assert message in screen.err
    assert "vision_jax's own unet (no library has it; num_classes=3" in screen.out
