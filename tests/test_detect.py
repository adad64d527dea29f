"""Detection runs: what they write, how they resume, what they warn of."""

import json
import shutil

import detection_runs
import jax
import numpy as np
import pytest
import runs
from PIL import Image

from vision_jax import convert, sharding, train
from vision_jax.commands import evaluate, predict
from vision_jax.config import load_config
from vision_jax.data.composites import write_composites
from vision_jax.data.detection import read_detection_source
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.run import prepare as preparation
from vision_jax.run.restore import restore
from vision_jax.tasks.detection import task as detect


@pytest.fixture(scope="module", autouse=True)
def finished():
    """The shared run, made before any test of this file replaces a part of the program."""
    return detection_runs.finished()


@pytest.fixture(scope="module")
def restored():
    return restore(detection_runs.tiny_config(), detection_runs.finished(), "last")


def evaluations(workdir):
    return [r for r in read_metrics(workdir / "metrics.jsonl") if "eval/ap" in r]


def test_a_run_leaves_its_numbers_pictures_and_model(finished):
    names = "evaluation.json results.json precision_recall.png confusion.png predictions.png"
    for name in (*names.split(), "curves.png", "categories.json", "model.safetensors"):
        assert (finished / name).stat().st_size > 0
    assert [record["step"] for record in evaluations(finished)] == [3, 6]
    summary = json.loads((finished / "evaluation.json").read_text())
    assert summary["ap"] == evaluations(finished)[-1]["eval/ap"]
    records = read_metrics(finished / "metrics.jsonl")
    losses = [record["train/loss"] for record in records if "train/loss" in record]
    assert len(losses) == detection_runs.STEPS
    assert all(np.isfinite(losses))
    assert "train/loss_giou" in records[0]


def test_weights_that_were_used_to_squares_get_squares():
    """transformers' DetrImageProcessor with height and width: the aspect ratio is not kept."""
    config = detection_runs.tiny_config(data__short=0, data__longest=0)
    mean = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    own = {"short": 96, "longest": 96, "square": True, "interpolation": "bilinear"}
    found = detect.make_preprocessing(config, own, mean)
    assert (found.short, found.square, found.buckets) == (96, True, ((96, 96),))
    own |= {"square": False, "longest": 128}
    assert not detect.make_preprocessing(config, own, mean).square
    own |= {"square": True, "longest": 96}
    config = detection_runs.tiny_config(data__short=64, data__longest=96)
    assert not detect.make_preprocessing(config, own, mean).square


def test_the_label_map_is_kept(finished):
    kept = json.loads((finished / "categories.json").read_text())["categories"]
    file = json.loads((detection_runs.data() / "train/train.json").read_text())
    assert [c["label"] for c in kept] == list(range(8))
    assert {c["category_id"]: c["name"] for c in kept} == {
        c["id"]: c["name"] for c in file["categories"]
    }


@pytest.mark.long
def test_evaluate_reprints_the_numbers_of_training(finished, capsys):
    capsys.readouterr()
    assert evaluate.run(detection_runs.tiny_config(evaluate__batch_size=5), finished, "last") == 0
    lines = capsys.readouterr().out.splitlines()
    record = evaluations(finished)[-1]
    assert lines[0].startswith("step 6: evaluation on 9 images: ap ")
    assert f"ap50 {record['eval/ap50']:.4f}" in lines[0]
    assert any(line.split()[:3] == ["ap", "of", "bag"] for line in lines)


@pytest.mark.long
def test_predictions_do_not_depend_on_batch_or_canvas(restored):
    source = detect.read_eval_source(
        detection_runs.tiny_config(), restored.run.description.class_names
    )
    found = []
    for batch_size, buckets in ((8, ((48, 48),)), (16, ((64, 80),))):
        config = detection_runs.tiny_config(evaluate__batch_size=batch_size)
        preprocessing = restored.run.description.preprocessing
        preprocessing = type(preprocessing)(**{**vars(preprocessing), "buckets": buckets})
        run_over = detect._make_run_over(
            config, restored.run.outputs_fn, restored.run.mesh, preprocessing
        )
        outputs, _ = run_over(source, *restored.trained.arguments)
        assert outputs["index"].tolist() == list(range(9))
        found.append(outputs)
    for name in ("score", "boxes_xyxy_px"):
        scale = np.abs(found[0][name]).max()  # sums over other numbers of zeros round otherwise
        np.testing.assert_allclose(found[0][name], found[1][name], rtol=0, atol=4e-6 * scale)


@pytest.mark.long
def test_resume_is_bit_identical(finished, tmp_path):
    config = detection_runs.tiny_config()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detect.Evaluation, "line", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path)
    assert train.run(config, tmp_path) == 0
    again = restore(config, tmp_path, "last").state
    once = restore(config, finished, "last").state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(once))


def interrupt(self):
    raise KeyboardInterrupt


@pytest.mark.long
def test_one_compile_a_canvas(tmp_path, monkeypatch):
    traces = []
    make_loss = preparation.make_loss

    def counted_loss(*arguments, **keywords):
        loss_fn = make_loss(*arguments, **keywords)

        def counted(trainable, frozen, model_state, batch, key):
            traces.append(batch["image"].shape[1:3])
            return loss_fn(trainable, frozen, model_state, batch, key)

        return counted

    monkeypatch.setattr(preparation, "make_loss", counted_loss)
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)
    folder = tmp_path / "two_shapes"
    write_composites(folder, "train", count=32, seed=2, size=64, plain=False)
    content = json.loads((folder / "train.json").read_text())
    for number, image in enumerate(content["images"]):  # the upper half, or the left one
        path, size = folder / image["file_name"], (64, 32) if number % 2 else (32, 64)
        image["width"], image["height"] = size
        Image.open(path).crop((0, 0, *size)).save(path)
    (folder / "train.json").write_text(json.dumps(content))
    config = detection_runs.tiny_config(
        data__train=folder / "train.json",
        data__short=32,
        data__longest=64,
        data__buckets=2,
        trainable=("class_head/.*",),
        optim__lr_multipliers=(),
        total_steps=20,
        evaluate__every=20,
        checkpoint_every=20,
    )
    assert train.run(config, tmp_path / "run") == 0
    assert len(traces) == len(set(traces)) == 2


def test_predict_writes_boxes_and_pictures(finished, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 70, 3)), ("b.jpg", (64, 48, 3))):
        Image.fromarray(rng.integers(0, 255, size, np.uint8)).save(folder / name)
    (folder / "broken.png").write_bytes(b"\x89PNG")
    config = detection_runs.tiny_config(evaluate__score=0.01)
    capsys.readouterr()
    assert predict.run(config, finished, "last", [str(folder)], tmp_path / "out") == 0
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["file"] for entry in record] == [
        str(folder / name) for name in ("a.png", "b.jpg", "broken.png")
    ]
    assert record[-1]["boxes"] == []
    assert "broken.png: not a readable image" in record[-1]["error"]
    for entry in record:
        scores = [box["score"] for box in entry["boxes"]]
        assert scores == sorted(scores, reverse=True)
        assert all(0.01 <= score <= 1 for score in scores)
        assert all(box["name"] == config_names()[box["label"]] for box in entry["boxes"])
    assert len(list((tmp_path / "out/predictions").glob("*.png"))) == 2
    screen = capsys.readouterr().out
    assert "skipped a damaged image" in screen
    assert "broken.png" in screen
    with pytest.raises(UserError, match="not one of its 1 images"):
        predict.run(config, finished, "last", [str(folder / "broken.png")], tmp_path)


def config_names():
    return read_detection_source(str(detection_runs.data() / "train/train.json")).class_names


@pytest.mark.long
def test_damaged_images_are_left_out_of_the_truth_too(restored, tmp_path):
    shutil.copytree(detection_runs.data() / "test", tmp_path / "test")
    source = read_detection_source(str(tmp_path / "test/test.json"))
    victim = tmp_path / "test" / source.paths[2]
    victim.write_bytes(victim.read_bytes()[:100])
    evaluate = detect.make_evaluate(
        detection_runs.tiny_config(),
        restored.run.outputs_fn,
        restored.run.mesh,
        source,
        restored.run.description.preprocessing,
    )
    result = evaluate(*restored.trained.arguments)
    assert result.summary["count"] == 8
    assert victim.name in result.damaged[0]
    assert result.source.paths == source.paths[:2] + source.paths[3:]
    assert "(1 damaged skipped)" in result.line()


@pytest.mark.long
def test_a_run_that_learns_nothing_says_so(tmp_path, capsys):
    config = detection_runs.tiny_config(evaluate__warn_after=4)
    assert train.run(config, tmp_path) == 0
    early, late = capsys.readouterr().out.split("step 3: ")[1].split("step 6: ")
    assert "warning: " not in early  # there was no time yet
    assert "warning: constant predictions" in late


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": ""}, "config.data.train"),
        ({"data__max_boxes": 9}, "8 queries"),
        ({"data__images": "nowhere"}, "nowhere"),
        ({"data__eval": "missing.json"}, r"missing\.json"),
        ({"task": "segmentation"}, "config.task"),
        ({"data__interpolation": "cubic"}, "interpolation"),
        ({"optim__lr_multipliers": (("spine/.*", 0.1),)}, "config.optim.lr_multipliers"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, changes, message):
    workdir = tmp_path / "run"
    with pytest.raises(UserError, match=message):
        train.run(detection_runs.tiny_config(**changes), workdir)
    assert not workdir.exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "model"), [("detr", {}), ("fasterrcnn", detection_runs.FASTER_RCNN)]
)
def test_the_plain_json_of_one_box_an_image_trains_and_reports_its_iou(file, model, tmp_path):
    write_composites(tmp_path / "plain", "train", count=16, seed=1, size=64, plain=True)
    fields = detection_runs.overrides(
        **model,
        data__train=tmp_path / "plain/train.json",
        data__eval="",
        data__eval_images="",
        data__holdout=0.25,
        trainable=("class_head/.*", "(rpn/)?box_head/.*"),
        optim__lr_multipliers=(),
        total_steps=4,
        evaluate__every=0,  # once an epoch: 12 images in batches of 8
    )
    config = load_config(str(runs.ROOT / f"configs/{file}_finetune.py"), fields)
    assert train.run(config, tmp_path / "run") == 0
    records = evaluations(tmp_path / "run")
    assert [record["step"] for record in records] == [2, 4]
    assert all(0 <= record["eval/mean_iou_top1"] <= 1 for record in records)


@pytest.mark.long
def test_the_same_step_on_one_and_on_eight_devices(restored):
    config = detection_runs.tiny_config()
    source, _ = detect.read_sources(config)
    data = detect.training_data(config, source, restored.run.description.preprocessing, None)
    batch = next(data)
    loss_fn = restored.run.loss_fn
    place = sharding.make_batch_placer(restored.run.mesh)
    value = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    host = jax.device_get(restored.trained.arguments)
    key = jax.random.key(0)
    (one, _), gradient = value(*host, batch, key)
    (eight, _), sharded = value(*restored.trained.arguments, place(batch), key)
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    norm = max(float(np.abs(x).max()) for x in gradient.values())
    for path in gradient:
        np.testing.assert_allclose(gradient[path], sharded[path], rtol=0, atol=2e-5 * norm)


@pytest.mark.long
@pytest.mark.parametrize("family", ["detr", "rf_detr"])
def test_accumulation_is_the_larger_batch(family):
    """Boxes are counted over the update: images have 1 to 4."""
    config = detection_runs.tiny_config(
        trainable=("class_head/.*", "box_head/.*"),
        model__dropout=0.0,
        optim__lr_multipliers=(),
        optim__clip_norm=0.0,
        **(detection_runs.RF_DETR if family == "rf_detr" else {}),
    )
    source, _ = detect.read_sources(config)
    run = preparation.prepare(config, source.class_names)
    state, frozen, _ = jax.device_get(run.make_arrays())
    batch = next(run.training_data(source, DamageLog()))
    batch = {name: np.concatenate([array, array[::-1]]) for name, array in batch.items()}
    batch["target_mask"][8:, 1:] = False  # fewer boxes in the second half
    counts = batch["target_mask"].sum(1)
    assert len(set(counts[::2] + counts[1::2])) > 1
    config.batch_size = 16
    found = []
    for accumulate in (1, 2):  # on 8 devices, so an image each
        config.optim.accumulate = accumulate
        run = preparation.prepare(config, source.class_names)
        new = run.make_state(state.trainable, state.model_state)
        placed = sharding.make_batch_placer(run.mesh)(batch)
        _, metrics = run.make_train_step()(new, frozen, placed)
        found.append(jax.device_get(metrics))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=2e-5, atol=1e-6, err_msg=name)


@pytest.mark.long
def test_frozen_parameters_stay_and_adapters_train(tmp_path):
    config = detection_runs.tiny_config(
        trainable=("class_head/.*",),
        recipes=("lora",),
        lora__rules=(".*_attn/(q|v)/kernel", "backbone/.*conv2/kernel"),
        lora__rank=2,
        total_steps=2,
        evaluate__every=2,
    )
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    base = "encoder_0/self_attn/q/kernel/base"
    assert base in restored.frozen
    assert any(path.endswith("/b") for path in restored.state.trainable)
    weights = convert.read_weights(str(tmp_path / "model.safetensors"))
    family, arguments = convert.recognize(weights)
    assert (family, arguments["num_classes"]) == ("detr", 8)
    assert restored.trained.arguments[0]["class_head/bias"].shape == (9,)
    assert runs.ROOT.is_dir()
