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
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

from vision_jax import convert
from vision_jax.commands.convert import main
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


def head_of(folder, images):
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(images)).logits.numpy()


@pytest.mark.parametrize(("size", "channels"), [((32, 16), 3), ((16, 16), 1), ((16, 48), 5)])
def test_a_folder_without_a_preprocessor_goes_there_and_back(size, channels, tmp_path, rng):
    """Also by timm's folder: images that are not square are resized whole, which all can write."""
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=256,
        image_size=size, patch_size=8, num_labels=3, num_channels=channels, layer_norm_eps=1e-6,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "source")
    run(tmp_path / "source", f"--out={tmp_path / 'out'}", "--to=transformers")
    run(tmp_path / "source", f"--out={tmp_path / 'timm'}", "--to=timm")
    run(tmp_path / "timm", f"--out={tmp_path / 'again'}", "--to=transformers")
    images = rng.normal(size=(1, channels, *size)).astype(np.float32)
    wanted = head_of(tmp_path / "source", images)
    for folder in ("out", "again"):
        np.testing.assert_array_equal(head_of(tmp_path / folder, images), wanted)
        weights = convert.read_weights(str(tmp_path / folder))
        assert weights.preprocessing["image_size"] == size
        assert len(weights.preprocessing["mean"]) == channels
        if channels < 5:  # what AutoImageProcessor makes of a photo fits the model
            processor = transformers.AutoImageProcessor.from_pretrained(
                tmp_path / folder, backend="pil"
            )
            photo = Image.new("RGB" if channels == 3 else "L", (50, 41))
            pixels = processor(photo, return_tensors="np")["pixel_values"]
            assert pixels.shape == (1, channels, *size)


def test_another_rounding_of_the_center_is_told(tmp_path, capsys):
    save_for_hf(resnet(), tmp_path / "source", safe_serialization=True)
    run(tmp_path / "source", f"--out={tmp_path / 'timm'}", "--to=timm")
    assert "note:" not in capsys.readouterr().out
    run(tmp_path / "source", f"--out={tmp_path / 'out'}", "--to=transformers")
    told = capsys.readouterr().out
    assert "transformers rounds the center of a crop otherwise than torchvision" in told


@pytest.mark.parametrize("ids", [(0, 2, 3), (1, 2), (0, 1, 2), (2,)])
def test_names_keep_their_ids(ids, tmp_path):
    """Of an id2label with holes a number without a name is LABEL_i; past the head it is refused."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    content = json.loads(path.read_text())
    content["id2label"] = {str(i): f"name {i}" for i in ids}
    path.write_text(json.dumps(content))
    command = [str(tmp_path / "source"), f"--out={tmp_path / 'out'}", "--to=transformers"]
    assert main(command) == (2 if max(ids) > 2 else 0)
    if max(ids) <= 2:
        written = transformers.AutoConfig.from_pretrained(tmp_path / "out").id2label
        assert written == {i: f"name {i}" if i in ids else f"LABEL_{i}" for i in range(3)}


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
