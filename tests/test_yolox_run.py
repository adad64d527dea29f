"""Runs of YOLOX: mosaics, several sizes, the end without them, resume, adapters under attack."""

import dataclasses
import re

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import convert, train
from vision_jax.config import load_config
from vision_jax.data.detection_transforms import resized_size
from vision_jax.data.pipeline import DamageLog
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.models.families import FAMILIES, build_model
from vision_jax.run import prepare as preparation
from vision_jax.run.restore import restore
from vision_jax.tasks.detection import task as detect

CONFIG = runs.ROOT / "configs/yolox_finetune.py"


def config_of(**more):
    fields = detection_runs.overrides(**{**detection_runs.YOLOX, **more})
    return load_config(str(CONFIG), fields)


def test_batches_come_in_all_sizes_and_end_plain():
    """The same ones again from the seed; mosaics mix images until the last two updates."""
    config = config_of(
        data__shorts=(64, 96), data__plain_steps=2, data__mosaic=1.0, data__mixup=1.0, batch_size=4
    )
    source, _ = detect.read_sources(config)
    own = {**FAMILIES["yolox"].preprocessing}
    preprocessing = detect.make_preprocessing(config, own, {"mean": (0.0,), "std": (1.0,)})
    assert preprocessing.buckets == ((64, 64), (96, 96))
    assert resized_size((40, 90), preprocessing) == (28, 64)
    preprocessing = dataclasses.replace(preprocessing, mean=(0.0,) * 3, std=(1.0,) * 3)
    runs_of_it = [
        [next(batches) for _ in range(10)]
        for batches in (
            detect.training_data(config, source, preprocessing, DamageLog()) for _ in range(2)
        )
    ]
    for batch, again in zip(*runs_of_it, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, again)
    shapes = [batch["image"].shape[1:3] for batch in runs_of_it[0]]
    assert set(shapes) == {(64, 64), (96, 96)}
    for number, batch in enumerate(runs_of_it[0]):
        most = np.array([len(source[int(row)]["label"]) for row in batch["index"]])
        found = batch["target_mask"].sum(1)
        assert (found > most).any() == (number < 4), number
        corners = batch["boxes_cxcywh_01"][batch["target_mask"]]
        assert (corners[:, :2] - corners[:, 2:] / 2 >= -1e-6).all()
        assert (corners[:, :2] + corners[:, 2:] / 2 <= 1 + 1e-6).all()


@pytest.mark.long
def test_predictions_depend_on_no_batch_and_on_nothing_beside_the_image():
    arguments = dict(detection_runs.YOLOX["model__arguments"])
    model = build_model("yolox", num_classes=3, **arguments)
    images = jnp.asarray(np.random.default_rng(0).random((3, 64, 64, 3)), jnp.float32)
    mask = jnp.ones((3, 64, 64), bool).at[1, 40:].set(False)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    evaluate = jax.jit(model.apply)
    whole = evaluate(variables, images, mask)
    other = evaluate(variables, jnp.where(mask[..., None], images, 0.7)[::-1], mask[::-1])
    alone = evaluate(variables, images[1:2], mask[1:2])
    for name in ("logits", "object_logits", "box_deltas"):
        np.testing.assert_allclose(whole[name], other[name][::-1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(whole[name][1:2], alone[name], rtol=1e-5, atol=1e-6)


def test_a_stage_and_what_comes_before_it_stay_frozen():
    """The rule that the config's docstring gives."""
    rule = "(?!backbone/(stem|stage_[01])/).*"
    assert f'--config.trainable="{rule}"' in CONFIG.read_text()
    golden = (runs.ROOT / "tests/golden/parameters/yolox.txt").read_text().splitlines()
    names = {line.split()[0] for line in golden if line.startswith("params/")}
    names = {name.removeprefix("params/") for name in names}
    early = ("backbone/stem/", "backbone/stage_0/", "backbone/stage_1/")
    frozen = {name for name in names if not re.fullmatch(rule, name)}
    assert frozen == {name for name in names if name.startswith(early)}
    assert {name.split("/")[1] for name in frozen} == {"stem", "stage_0", "stage_1"}


@pytest.mark.long
def test_a_run_resumes_where_it_stopped(tmp_path, capsys):
    """One program a size. The last two updates add the L1 loss; then boxes of a file, and the
    weights as published."""
    mosaics = {"data__mosaic": 1.0, "data__mixup": 1.0, "data__plain_steps": 2}
    config = config_of(data__shorts=(64, 96), **mosaics)
    programs = detection_runs.check_resume(config, tmp_path)
    assert programs[0] == 2
    assert max(programs[1:]) <= 2  # each saw a part of the sizes
    records = read_metrics(tmp_path / "once/metrics.jsonl")
    for record in (record for record in records if "train/loss" in record):
        terms = 5 * record["train/loss_box"] + record["train/loss_object"]
        terms += record["train/loss_class"]
        wanted = record["train/loss_l1"] if record["step"] > 4 else 0.0
        more = record["train/loss"] - terms
        np.testing.assert_allclose(more, wanted, rtol=1e-3, atol=1e-3, err_msg=record["step"])

    detection_runs.check_predictions(config, tmp_path / "once", tmp_path)  # is not sure of any yet
    found = convert.read_weights(str(tmp_path / "once/model.safetensors"))
    assert convert.recognize(found)[0] == "yolox"
    assert found.preprocessing["rule"] == "letterbox"
    assert found.preprocessing["short"] == 64
    assert "head.cls_preds.0.weight" in found.tensors
    capsys.readouterr()


@pytest.mark.long
def test_adapters_train_against_attacks(tmp_path):
    config = config_of(
        recipes=("lora", "adversarial"),
        model__freeze_norm=True,
        trainable=("head_./(class|box|object)_head/.*",),
        lora__rules=("backbone/stage_.*conv/kernel",),
        lora__rank=2,
        adversarial__steps=1,
        data__shorts=(),
        data__mosaic=0,
        total_steps=2,
        evaluate__every=2,
    )
    assert train.run(config, tmp_path) == 0
    restored = restore(config, tmp_path, "last")
    assert "backbone/stage_0/down/conv/kernel/base" in restored.frozen
    assert "backbone/stage_0/down/conv/kernel/b" in restored.state.trainable
    weights = convert.read_weights(str(tmp_path / "model.safetensors"))
    assert convert.recognize(weights)[0] == "yolox"


@pytest.mark.long
def test_what_does_not_fit_is_refused():
    """In one line: sizes of no 32, and mosaics of images that are no squares."""
    config = config_of(data__short=72, data__longest=72, data__shorts=())
    source, _ = detect.read_sources(config)
    with pytest.raises(UserError, match="72 x 72 pixels: YOLOX takes multiples of 32"):
        preparation.prepare(config, source.class_names).make_arrays()
    config = config_of(recipes=("lora",), lora__rules=("backbone/.*conv/kernel",))
    with pytest.raises(UserError, match="rules: backbone/stem/conv/kernel is no layer of its own"):
        preparation.prepare(config, source.class_names)
    arguments = (("stem_width", 4), ("width", 8))
    config = config_of(model__variant="nanodet", model__arguments=arguments)
    with pytest.raises(
        UserError, match="NanoDet finds boxes and is evaluated, but it is not train"
    ):
        preparation.prepare(config, source.class_names).make_train_step()
    config = detection_runs.tiny_config(data__mosaic=0.5)
    run = preparation.prepare(config, source.class_names)
    with pytest.raises(UserError, match="a mosaic is square, and this model's images are not"):
        run.training_data(source, None)
