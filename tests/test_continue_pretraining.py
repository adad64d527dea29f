"""configs/continue_pretraining.py: from folders of timm's and transformers' to the same again."""

import json

import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file
from unlabelled_runs import TINY

from vision_jax import convert
from vision_jax.commands import convert as converter
from vision_jax.main import main

FILE = runs.ROOT / "configs/continue_pretraining.py"
OWN = {
    "self_distillation": {
        "model.arguments": "(('prototypes', 16), ('head_width', 8), ('bottleneck', 4))",
        "dino.view_size": 16, "dino.local_size": 8, "dino.local_crops": 2,
    },
    "contrastive": {
        "model.arguments": "(('head_width', 8), ('projection', 4))", "contrastive.view_size": 20,
    },
    "pretraining": {
        "model.arguments": "(('decoder_width', 16), ('decoder_depth', 1), "
        "('decoder_num_heads', 2), ('decoder_mlp_width', 32))",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder of unlabelled photos at any depth, and a ViT as timm and transformers have it."""
    folder, rng = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for number in range(30):
        place = folder / "images" / ("scans" if number % 2 else "more/of them")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (24, 28, 3), np.uint8)
        Image.fromarray(pixels).save(place / f"{number}.png")
    for to in ("timm", "transformers"):
        flags = [f"--to={to}", f"--out={folder / to}"]
        assert converter.main([str(runs.inputs() / "weights.safetensors"), *flags]) == 0
    return folder


@pytest.mark.long
@pytest.mark.parametrize(
    ("objective", "source"),
    [
        ("self_distillation", "timm"),
        ("contrastive", "transformers"),
        ("pretraining", "transformers"),
        ("contrastive/full", "timm"),
    ],
)
def test_a_vit_goes_on_and_comes_out_as_one(objective, source, own, tmp_path):
    fields = {**TINY, **OWN[objective.partition("/")[0]], "total_steps": 3, "evaluate.every": 0}
    fields |= {"data.train": own / "images", "model.weights": own / source, "model.image_size": 0}
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    workdir = tmp_path / "run"
    assert main([f"--config={FILE}:{objective}", f"--workdir={workdir}", *flags]) == 0
    adapted = (workdir / "adapter/adapter_model.safetensors").is_file()
    assert adapted == ("full" not in objective)
    before = load_file(own / "timm/model.safetensors")
    after = load_file(workdir / "model.safetensors")
    assert (after["norm.weight"] == before["norm.weight"]).all() == adapted
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        kernel = f"blocks.0.{name}.weight"
        assert (after[kernel] != before[kernel]).any(), name
    for to in ("timm", "transformers"):
        out = tmp_path / to
        assert converter.main([str(workdir), f"--to={to}", f"--out={out}"]) == 0
        family, arguments = convert.recognize(convert.read_weights(str(out)))
        assert (family, arguments["depth"], arguments["width"]) == ("vit", 1, 32)
    assert json.loads((workdir / "config.json").read_text())["seed"] == 0


def test_an_unknown_objective_is_one_line(capsys):
    assert main([f"--config={FILE}:dino"]) == 2
    said = capsys.readouterr().err
    assert "use self_distillation, contrastive, pretraining, each with /full" in said
