"""AP against epsilon of a finished detector: figures, files, and what is refused."""

import dataclasses
import json

import detection_runs
import jax
import numpy as np
import pytest
import runs
from jax.sharding import Mesh

from vision_jax.attacks import gradient
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.run.prepare import prepare
from vision_jax.run.restore import restore
from vision_jax.tasks import gradient_attacks
from vision_jax.tasks.detection import robustness as robust
from vision_jax.tasks.detection import task as detect
from vision_jax.tasks.detection.figures import draw_robustness


@pytest.fixture(scope="module")
def restored():
    return restore(detection_runs.tiny_config(), detection_runs.finished(), "last")


def robustness(restored, workdir, **fields):
    config = detection_runs.tiny_config(
        **{f"robustness__{name}": value for name, value in fields.items()}
    )
    return detect.robustness(config, workdir, restored.trained, lambda folder: restored.trained)


@pytest.mark.long
def test_figures_of_each_epsilon_and_a_picture(restored, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(robust, "PICTURES", 2)
    capsys.readouterr()
    epsilons = (0.05, 0.01)
    fields = {"images": 5, "batch_size": 8, "attacks": ("pgd",), "steps": 2, "norm": "l2"}
    record = robustness(restored, tmp_path, epsilons=epsilons, **fields)
    assert record == json.loads((tmp_path / "robustness.json").read_text())
    assert record["images"] == record["clean"]["count"] == 5
    assert record["clean"]["largest"] == 0
    rows = record["attacks"]["pgd"]
    assert [row["epsilon"] for row in rows] == [0.01, 0.05]
    for row in rows:
        assert 0.9 * row["epsilon"] < row["largest"] < 1.0001 * row["epsilon"]
    assert (tmp_path / "robustness.png").stat().st_size > 20_000
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["data:", "clean", *["pgd"] * 2, *["wrote"] * 2]
    assert lines[2].endswith("n=5")


MODELS = {
    "yolox": ("yolox_finetune.py", detection_runs.YOLOX),
    "faster_rcnn": ("fasterrcnn_finetune.py", detection_runs.FASTER_RCNN),
    "retinanet": ("retinanet_finetune.py", detection_runs.RETINANET),
    "fcos": ("retinanet_finetune.py", detection_runs.FCOS),
}


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
def test_detectors_without_queries_are_attacked_by_their_own_loss(name, tmp_path, monkeypatch):
    """Plain images give evaluate's boxes; one step of 8 of 255 levels raises each image's loss.

    A YOLOX takes levels from 0 to 255, inside of its apply.
    """
    file, model = MODELS[name]
    fields = detection_runs.overrides(
        **model,
        robustness__images=0,
        robustness__batch_size=8,
        robustness__attacks=("fgsm",),
        robustness__epsilons=(8 / 255,),
    )
    config = load_config(str(runs.ROOT / "configs" / file), fields)
    source, held_out = detect.read_sources(config)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    run = prepare(config, source.class_names, mesh=mesh)
    state, frozen, _ = run.make_arrays()
    # A detector before training finds nothing it is sure of.
    surer = {
        path: leaf + 5 if path.endswith(("object_head/bias", "class_head/bias")) else leaf
        for path, leaf in state.trainable.items()
    }
    trained = run.trained(dataclasses.replace(state, trainable=surer, ema=None), frozen)
    wanted = run.make_evaluate(held_out)(*trained.arguments)

    seen, losses, evaluation = [], [], detect._evaluation
    monkeypatch.setattr(robust, "PICTURES", 0)
    monkeypatch.setattr(
        detect, "_evaluation", lambda *given: seen.append(evaluation(*given)) or seen[-1]
    )

    def watched(loss, images, keys, *, epsilon, pixel_mask):
        adversarial = gradient.fgsm(
            loss, images, keys, epsilon=epsilon, norm="linf", pixel_mask=pixel_mask
        )
        pair = (loss(images)[0], loss(adversarial)[0])
        jax.debug.callback(lambda *pair: losses.append(pair), *pair)
        return adversarial

    monkeypatch.setattr(gradient_attacks, "make_attack", lambda *names, **settings: watched)
    record = detect.robustness(config, tmp_path, trained, lambda folder: trained)
    clean, attacked = seen
    assert record["clean"]["ap"] == wanted.summary["ap"]
    assert len(wanted.detections.score) > 9
    for field in ("index", "label", "score", "boxes_xyxy_px"):
        ours, theirs = (getattr(x.detections, field) for x in (clean, wanted))
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3, err_msg=field)
    [row] = record["attacks"]["fgsm"]
    np.testing.assert_allclose(row["largest"], 8 / 255, rtol=1e-5)
    assert not np.array_equal(attacked.detections.score, wanted.detections.score)
    before, after = np.concatenate(losses, axis=1)[:, :9]
    assert after.mean() > before.mean()
    assert (after > before).mean() > 0.5


@pytest.mark.long
def test_an_unknown_attack_is_refused(restored, tmp_path):
    with pytest.raises(UserError, match="a detector's are fgsm and pgd, not `fgms`: did you mean"):
        robustness(restored, tmp_path, attacks=("fgms",))


def test_a_picture_without_boxes_or_classes_that_are_found(tmp_path):
    clean = {"ap": None, "ap50": None, "ap75": None, "count": 1}
    record = {"images": 1, "norm": "linf", "clean": clean, "attacks": {}}
    draw_robustness(record, [], (), tmp_path / "none.png", score=0.5)
    line = gradient_attacks.line("clean", clean, robust.SHOWN)
    assert " ".join(line.split()) == "clean ap - ap50 - ap75 - n=1"
    image = np.full((9, 7, 1), 0.25, np.float32)
    found = {
        "image": image,
        "adversarial": image + 1 / 255,
        "score": np.zeros(1, np.float32),
        "label": np.zeros(1, np.int32),
        "boxes_xyxy_px": np.zeros((1, 4), np.float32),
    }
    record["attacks"] = {"fgsm": [clean | {"epsilon": 1 / 255, "largest": 1 / 255}]}
    path = draw_robustness(record, [(found, found)], ("a",), tmp_path / "a.png", score=0.5)
    assert path.stat().st_size > 5_000
