"""What is common to detectors and segmenters under attack: what is said, written and chosen."""

import json

import numpy as np
import pytest

from vision_jax.data.pipeline import Damaged
from vision_jax.errors import UserError
from vision_jax.tasks import gradient_attacks
from vision_jax.tasks.images import source_of

SETTINGS = gradient_attacks.Settings(("fgsm", "pgd"), "linf", (0.1, 0.2), 2, 1, 0, 4, 0)


def measure(folder, settings):
    drawn = []

    def make_measure(attack):
        def measure_at(epsilon, damage):
            damage.record(2, [Damaged(1, "b.png", "b.png: cut short")])
            return {"iou": None if attack is gradient_attacks.no_attack else 0.5, "count": 2}

        return measure_at

    record = gradient_attacks.measure(
        folder,
        settings,
        source=source_of(("a.png", "b.png", "c.png")),
        what="segmenter",
        make_measure=make_measure,
        shown=("iou",),
        make_pictures=lambda attack, epsilon: [epsilon],
        draw=lambda record, pictures, path: drawn.append((record, pictures, path)),
    )
    return record, drawn


def test_the_data_and_why_an_image_is_left_out_are_said_once(tmp_path, capsys):
    record, [drawn] = measure(tmp_path, SETTINGS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "data: --images, 3 images"
    assert lines[1].split() == ["clean", "iou", "-", "n=2"]
    assert [line for line in lines if "skipped" in line] == [
        "skipped a damaged image: b.png: cut short"
    ]
    assert len(lines) == 3 + 2 * 2 + 2
    assert drawn == (record, [0.2], tmp_path / "robustness.png")
    assert json.loads((tmp_path / "robustness.json").read_text()) == record
    assert [row["epsilon"] for row in record["attacks"]["pgd"]] == [0.1, 0.2]


def test_an_unknown_attack_is_refused_before_anything_is_measured(tmp_path, capsys):
    with pytest.raises(UserError, match="a segmenter's are fgsm and pgd, not `fgms`: did you mean"):
        measure(tmp_path, gradient_attacks.Settings(("fgms",), "linf", (0.1,), 1, 1, 0, 4, 0))
    assert not capsys.readouterr().out


def test_images_are_chosen_evenly():
    assert gradient_attacks.choose(7, 0).all()
    assert gradient_attacks.choose(7, 9).all()
    assert np.flatnonzero(gradient_attacks.choose(7, 3)).tolist() == [0, 3, 6]
