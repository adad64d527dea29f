"""Runs whose targets are segments: instances and panoptic, from COCO's files to COCO's files."""

import functools
import json

import hotcoco
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from PIL import Image
from segmentation_runs import tiny_config

from vision_jax import train
from vision_jax.commands import evaluate, predict, robustness
from vision_jax.data.segmentation import read_segmentation_source
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.ops.mask_losses import draw_points, mask_set_loss
from vision_jax.run.restore import restore
from vision_jax.tasks.segmentation.objective import make_mask_loss

EOMT = {
    "patch_size": 4, "width": 16, "depth": 2, "num_heads": 2, "mlp_width": 16, "num_queries": 6,
    "num_blocks": 1, "upscale_blocks": 1,
}  # fmt: skip
SIZES = [(24, 32), (30, 20), (24, 32)]


@functools.cache
def data():
    """COCO instances of discs and bars in a folder, with ids that are no rows."""
    folder, rng = runs.inputs() / "coco_discs", np.random.default_rng(0)
    folder.mkdir()
    images, annotations = [], []
    for row, (height, width) in enumerate(SIZES):
        image = np.full((height, width, 3), 60, np.uint8)
        images.append(
            {"id": 100 - row, "file_name": f"{row}.png", "height": height, "width": width}
        )
        for kind in (0, 1, 0):
            top, left = rng.integers(0, (height - 9, width - 9)).tolist()
            image[top : top + 8, left : left + 8] = (200, 60, 60) if kind else (60, 60, 200)
            ring = [left, top, left + 8, top, left + 8, top + 8, left, top + 8]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": 100 - row, "category_id": 10 * kind + 2,
                 "segmentation": [ring], "area": 64, "bbox": [left, top, 8, 8], "iscrowd": 0}
            )  # fmt: skip
        Image.fromarray(image).save(folder / f"{row}.png")
    categories = [{"id": 2, "name": "disc"}, {"id": 12, "name": "bar"}]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / "instances.json").write_text(json.dumps(content))
    return folder / "instances.json"


def config_of(targets, **more):
    fields = {
        "model__variant": "eomt",
        "model__arguments": tuple(EOMT.items()),
        "model__image_size": 32,
        "loss__points": 64,
        "data__targets": targets,
        "data__train": data(),
        "data__eval": data(),
        "data__max_segments": 6,
        "evaluate__background": "",
        "evaluate__objects": "",
        "evaluate__score": 0.2,
        "total_steps": 2,
        "evaluate__every": 2,
    }
    return tiny_config(**(fields | more))


@functools.cache
def finished(targets):
    workdir = runs.inputs() / f"finished_{targets}"
    assert train.run(config_of(targets), workdir) == 0
    return workdir


@pytest.mark.long
def test_a_run_with_instances_is_scored_alike_by_coco(capsys):
    workdir = finished("instance")
    summary = json.loads((workdir / "evaluation.json").read_text())
    assert summary["count"] == 3
    assert summary["true_instances"] == 9
    assert list(summary["per_class"]) == ["disc", "bar"]
    truth = hotcoco.COCO(str(data()))
    results = json.loads((workdir / "results.json").read_text())
    assert {row["image_id"] for row in results} <= {98, 99, 100}
    assert {row["category_id"] for row in results} <= {2, 12}
    evaluator = hotcoco.COCOeval(truth, truth.load_res(results), "segm")
    evaluator.run()
    np.testing.assert_allclose(evaluator.stats[:3], [summary[n] for n in ("ap", "ap50", "ap75")])
    for name in ("predictions.png", "precision_recall.png"):
        with Image.open(workdir / name) as picture:
            assert picture.width > 1000
    records = read_metrics(workdir / "metrics.jsonl")
    assert [r["eval/ap"] for r in records if "eval/ap" in r] == [summary["ap"]]
    config = config_of("instance")
    assert evaluate.run(config, workdir, "best") == 0
    assert f"9 instances: ap {summary['ap']:.4f}" in capsys.readouterr().out
    with pytest.raises(UserError, match="robustness is of classes of pixels alone"):
        robustness.run(config, workdir, "last")


@pytest.mark.long
def test_panoptic_files_are_read_back(tmp_path):
    """What a run writes is a source of the same segments, whose quality is 1 against itself."""
    workdir = finished("panoptic")
    summary = json.loads((workdir / "evaluation.json").read_text())
    assert list(summary["per_class"]) == ["background", "disc", "bar"]
    assert summary["pq"] is not None
    restored = restore(config_of("panoptic", evaluate__score=0.0), workdir, "last")
    source = restored.run.task.read_eval_source(restored.run.config, summary_names(summary))
    result = restored.run.make_evaluate(source)(*restored.trained.arguments)
    files = restored.run.task.write_results(
        restored.run.config, tmp_path, result, source, restored.run.description.preprocessing
    )
    assert set(files) == {"evaluation.json", "predictions.png", "panoptic.json"}
    back = read_segmentation_source(
        str(tmp_path / "panoptic.json"), images=data().parent, targets="panoptic"
    )
    assert back.class_names == ("background", "disc", "bar")
    assert back.stuff == ("background",)
    rows = {back.image_id(i): i for i in range(len(back))}
    for row, found in result.found.items():
        again = back.segments(rows[source.image_id(row)])
        np.testing.assert_array_equal(again.map(), found.map())
        np.testing.assert_array_equal(again.label, found.label)


def summary_names(summary):
    return tuple(summary["per_class"])


@pytest.mark.long
@pytest.mark.parametrize("targets", ["instance", "panoptic"])
def test_predict_writes_segments(targets, tmp_path, capsys):
    photos = [data().parent / "0.png", data().parent / "1.png", tmp_path / "c.png"]
    photos[2].write_bytes(b"no image")
    names = [str(photo) for photo in photos]
    config = config_of(targets, evaluate__score=0.05)
    assert predict.run(config, finished(targets), "last", names, tmp_path / "out") == 0
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry["id"] for entry in record["images"]] == [0, 1, 2]
    assert "not a readable image" in record["images"][2]["error"]
    assert f"skipped a damaged image: {photos[2]}" in capsys.readouterr().out
    for entry, size in zip(record["images"], SIZES[:2], strict=False):
        assert (entry["height"], entry["width"]) == size
    picture = np.asarray(Image.open(tmp_path / "out/overlays/0000_0.png"))
    assert picture.shape == (24 * 15, 32 * 15, 3)
    counts = [len(entry["segments"]) for entry in record["images"][:2]]
    if targets == "instance":
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert sum(counts) == len(results)
        assert all(row["score"] >= 0.05 for row in results)
        for row in results:
            height, width = SIZES[row["image_id"]]
            assert row["segmentation"]["size"] == [height, width]
    else:
        content = json.loads((tmp_path / "out/panoptic.json").read_text())
        assert [len(one["segments_info"]) for one in content["annotations"]] == counts
        number = np.asarray(Image.open(tmp_path / "out/panoptic/0001_1.png")).astype(int)[..., 0]
        listed = {one["id"]: one["area"] for one in content["annotations"][1]["segments_info"]}
        found = {int(i): int((number == i).sum()) for i in np.unique(number) if i}
        assert found == listed


@pytest.mark.long(but=("changes0-take one that finds masks",))
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__variant": "unet_plain", "model__arguments": ()}, "take one that finds masks"),
        ({"data__max_segments": 2}, r"0\.png: 3 segments, and config\.data\.max_segments is 2"),
        ({"data__max_segments": 9}, "max_segments is 9, and the model has 6 queries.*lower it"),
        ({"data__view": "windows"}, "set config.data.view=squash"),
        ({"data__stuff": ("sky",)}, "config.data.stuff 'sky' is none of its classes"),
        ({"data__train": "embedded:nuclei/train", "data__targets": "all"}, "semantic, instance"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as error:
        train.run(config_of("instance", **changes), tmp_path / "run")
    assert "\n" not in str(error.value)


@pytest.mark.long
def test_the_loss_of_segments_is_the_set_loss_of_their_masks(rng):
    """Padding counts nothing, nor does what other images of the update have but for its number."""
    batch, queries, most, side = 3, 6, 4, 8
    logits = rng.normal(size=(2, batch, queries, 3)).astype(np.float32)
    outputs = {
        "logits": jnp.asarray(logits),
        "mask_logits": jnp.asarray(rng.normal(size=(2, batch, queries, side, side)), jnp.float32),
    }
    label = np.array([[1, 0, -1, -1], [0, 1, 1, -1], [-1] * 4], np.int32)
    masks = (rng.random((batch, most, side, side)) < 0.5).astype(np.uint8)
    masks[label < 0] = 0
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), batch)
    given = {
        "label": jnp.asarray(label),
        "masks": jnp.asarray(masks),
        "draws": jax.random.key_data(keys),
    }
    whole = np.concatenate([label, label])
    given["whole"] = {"label": jnp.asarray(whole)}
    weights = {"class_weight": 2.0, "mask_weight": 5.0, "no_object_weight": 0.1}

    class Model:
        num_classes, num_queries = 2, queries

    loss = make_mask_loss(Model, mask_dice_weight=5.0, points=32, most_segments=most, **weights)
    ours, metrics = jax.jit(loss)(outputs, given)

    def points(prediction):
        own = jax.vmap(lambda key: jax.random.fold_in(key, prediction))(keys)
        return draw_points(own, most, 32)

    wanted, _ = mask_set_loss(
        *(outputs["logits"], outputs["mask_logits"], jnp.maximum(label, 0), jnp.asarray(masks)),
        jnp.asarray(label >= 0), points=points, dice_weight=5.0, whole=jnp.asarray(whole >= 0),
        **weights,
    )  # fmt: skip
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    noise = np.where((label >= 0)[..., None, None], masks, 1).astype(np.uint8)
    again, _ = jax.jit(loss)(outputs, {**given, "masks": jnp.asarray(noise)})
    np.testing.assert_allclose(again, ours, rtol=1e-6)
    assert metrics["mask_loss"] > 0
