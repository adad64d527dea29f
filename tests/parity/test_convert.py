"""The converter against the libraries themselves: their files in, their own strict loading out."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from vision_jax import convert
from vision_jax.convert.__main__ import main
from vision_jax.errors import UserError


def resnet(seed=0, **arguments):
    torch.manual_seed(seed)
    model = timm.create_model("resnet18", num_classes=7, **arguments).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def logits(model):
    images = torch.linspace(-1, 1, 2 * 3 * 65 * 64).reshape(2, 3, 65, 64).sin()
    with torch.no_grad():
        found = model.double()(images.double())
    return getattr(found, "logits", found).numpy()


def run(*arguments):
    assert main(list(map(str, arguments))) == 0


def test_one_model_loads_strictly_in_all_three_libraries(tmp_path):
    model = resnet()
    save_for_hf(model, tmp_path / "source", safe_serialization=True)
    for to in ("timm", "torchvision", "transformers"):
        run(tmp_path / "source", f"--out={tmp_path / to}", f"--to={to}")
    expected = logits(model)

    there = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    np.testing.assert_array_equal(logits(there), expected)

    config = json.loads((tmp_path / "torchvision" / "config.json").read_text())
    there = torchvision.models.get_model(config["model"], **config["kwargs"]).eval()
    there.load_state_dict(load_file(tmp_path / "torchvision/model.safetensors"), strict=True)
    np.testing.assert_allclose(logits(there), expected, rtol=1e-12, atol=1e-12)

    there, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "transformers", output_loading_info=True
    )
    assert not any(report.values())
    np.testing.assert_allclose(logits(there.eval()), expected, rtol=1e-12, atol=1e-12)


def test_shards_load_in_transformers(tmp_path):
    model = resnet()
    save_for_hf(model, tmp_path / "source", safe_serialization=True)
    shards = ("--to=transformers", "--shard-gb=0.01")
    run(tmp_path / "source", f"--out={tmp_path / 'out'}", *shards)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    there, report = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    np.testing.assert_allclose(logits(there.eval()), logits(model), rtol=1e-12, atol=1e-12)


def test_torchvisions_preprocessing_comes_back(tmp_path):
    save_for_hf(resnet(), tmp_path / "source", safe_serialization=True)
    run(tmp_path / "source", f"--out={tmp_path / 'out'}", "--to=torchvision")
    header_free = load_file(tmp_path / "out" / "model.safetensors")
    save_file(header_free, tmp_path / "out" / "model.safetensors")
    own = convert.read_weights(str(tmp_path / "source")).preprocessing
    again = convert.read_weights(str(tmp_path / "out")).preprocessing
    sizes = [int(found["image_size"][0] / found["crop_pct"]) for found in (own, again)]
    assert sizes == [235, 235]  # torchvision names the size, and timm the share
    assert {**again, "crop_pct": own["crop_pct"]} == own


# timm:// and torchvision:// ----------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """torch's cache of downloads, empty, and cut off from any network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)

    def refuse(*arguments, **keywords):
        raise OSError("there is no network here")

    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_torchvision_by_name(cache, monkeypatch):
    with pytest.raises(UserError, match="not to be had"):
        convert.read_weights("torchvision://resnet18")
    entry = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    model = torchvision.models.resnet18()
    torch.save(model.state_dict(), cache / Path(entry.url).name)
    for spec in ("torchvision://resnet18", "torchvision://resnet18@IMAGENET1K_V1"):
        weights = convert.read_weights(spec)
        family, arguments = convert.recognize(weights)
        assert (family, arguments["num_classes"]) == ("resnet", 1000)
        assert weights.preprocessing["crop_pct"] == pytest.approx(224 / 256)
        assert weights.preprocessing["interpolation"] == "bilinear"
        assert convert.class_names_of(weights)[:2] == ["tench", "goldfish"]
    with pytest.raises(UserError, match="IMAGENET1K_V1"):
        convert.read_weights("torchvision://resnet18@V9")
    with pytest.raises(UserError, match="resnet18"):
        convert.read_weights("torchvision://resnet81")


def test_timm_by_name_from_the_hub(tmp_path, monkeypatch):
    save_for_hf(resnet(), tmp_path, safe_serialization=True)
    asked = []

    def download(repository, **keywords):
        asked.append(repository)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    weights = convert.read_weights("timm://resnet18.a1_in1k")
    assert asked == ["timm/resnet18.a1_in1k"]
    assert weights.metadata["config"]["architecture"] == "resnet18"
    assert weights.metadata["config"]["num_classes"] == 7  # what the repository says
    (tmp_path / "config.json").unlink()  # then what timm itself knows
    weights = convert.read_weights("timm://resnet18.a1_in1k")
    assert "num_classes" not in weights.metadata["config"]
    assert weights.preprocessing["crop_pct"] == 0.95
    convert.read_weights("timm://resnet18")
    assert asked[-1] == timm.get_pretrained_cfg("resnet18").hf_hub_id
    for wrong in ("timm://resnet81", "timm://resnet18.nothing", "timm://../x"):
        with pytest.raises(UserError) as caught:
            convert.read_weights(wrong)
        assert "\n" not in str(caught.value)


def test_timm_by_name_from_an_address(cache, monkeypatch):
    cfg = timm.get_pretrained_cfg("resnet18.a1_in1k")
    plain = timm.models.PretrainedCfg(url="https://example.org/r18-0123abcd.pth", crop_pct=0.9)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda *name, **keywords: plain)
    assert cfg.hf_hub_id
    with pytest.raises(UserError, match="not to be had"):
        convert.read_weights("timm://resnet18.a1_in1k")
    torch.save({"state_dict": resnet().state_dict()}, cache / "r18-0123abcd.pth")
    weights = convert.read_weights("timm://resnet18.a1_in1k")
    assert weights.preprocessing["crop_pct"] == 0.9
    assert weights.files == (cache / "r18-0123abcd.pth",)


def test_without_timm_a_tagged_name_is_found_on_the_hub(tmp_path, monkeypatch):
    save_for_hf(resnet(), tmp_path, safe_serialization=True)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert convert.read_weights("timm://resnet18.a1_in1k").metadata["config"]
    with pytest.raises(UserError, match="pip install timm"):
        convert.read_weights("timm://resnet18")
