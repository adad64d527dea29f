"""The command line of certificates, end to end on one small model."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

import vision_jax.certify.__main__ as command
from vision_jax.certify import zoo
from vision_jax.certify.measure import LIBRARIES, relative_error
from vision_jax.certify.references import Reference, full_arguments
from vision_jax.certify.render import render
from vision_jax.convert.table import Entry

NAME = "timm/resnet10t_of_ours"
ARGUMENTS = (("layers", (1, 1, 1, 1)), ("channels", (8, 8, 16, 16)), ("num_classes", 5))
ENTRY = Entry(NAME, "ResNet", "resnet18", ARGUMENTS, image_size=64)


@pytest.fixture(autouse=True)
def with_entry(monkeypatch):
    monkeypatch.setattr(zoo, "ZOO", (*zoo.ZOO, ENTRY))


def test_a_certificate_passes_and_renders(tmp_path, capsys, monkeypatch):
    out = tmp_path / "certificates"
    monkeypatch.setattr(command, "TABLE", tmp_path / "zoo.md")
    assert command.main([NAME, f"--out={out}", "--seed=3"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"PASS {NAME}: float32 ")
    record = json.loads((out / f"{NAME}.json").read_text())
    assert record["pass"] is True
    assert record["reasons"] == []
    assert record["strict_load"] is True
    assert record["round_trip_identical"] is True
    assert record["top1_agreement"] == 1
    assert record["worst"]["float32"] <= 1e-5
    assert record["worst"]["float64"] <= 1e-12
    for errors in record["errors"].values():
        assert set(errors) == {"stem", *(f"stage_{i}" for i in range(4)), "pooled", "logits"}
    assert record["tensors_consumed"] == record["tensors"]
    assert record["parameters_filled"] == record["parameters_in_model"]
    assert len(record["sha256"]) == 64
    assert set(record["versions"]) == {*LIBRARIES, "vision_jax", "python"}
    assert record["versions"]["timm"] == timm.__version__
    assert record["weights"] == "random, every statistic randomized"
    assert record["preprocessing"]["largest_difference_in_255ths"] <= 1
    module = timm.create_model("resnet18", **dict(ARGUMENTS))
    assert record["parameters"] == sum(p.numel() for p in module.parameters())
    assert record["gflops"] > 0
    assert "arguments" not in record

    assert command.main(["--render", f"--out={out}"]) == 0
    table = (tmp_path / "zoo.md").read_text()
    assert "1 variants over 1 families and 1 sources (timm); 1 certificates pass." in table
    (row,) = (line for line in table.splitlines() if line.startswith(f"| [{NAME}]"))
    assert f"{record['worst']['float32']:.1e}" in row
    assert "fails" not in row


def test_a_falsified_weight_fails(tmp_path, capsys, monkeypatch):
    """After the reference is saved, one of its weights moves by a thousandth of the largest."""
    save = Reference.save

    def save_and_falsify(reference, folder):
        path = save(reference, folder)
        with torch.no_grad():
            weight = reference.module.get_parameter("layer2.0.conv1.weight")
            weight[0, 0, 0, 0] += 0.001 * weight.abs().max()
        return path

    monkeypatch.setattr(Reference, "save", save_and_falsify)
    assert command.main([NAME, f"--out={tmp_path}"]) == 1
    assert capsys.readouterr().out.startswith(f"FAIL {NAME}: ")
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record["pass"] is False
    assert any("float64 error" in reason for reason in record["reasons"])
    errors = record["errors"]["float64"]
    assert errors["stage_0"] <= 1e-12 < errors["stage_1"]  # and it says where
    assert "**fails**" in render(tmp_path)


def test_given_weights_are_the_ones_certified(tmp_path, capsys):
    module = timm.create_model("resnet18", **dict(ARGUMENTS))
    save_file(module.state_dict(), tmp_path / "mine.safetensors")
    given = [NAME, f"--weights={tmp_path / 'mine.safetensors'}", f"--out={tmp_path}"]
    assert command.main(given) == 0
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["weights"] == "mine.safetensors"
    capsys.readouterr()
    (tmp_path / f"{NAME}.json").unlink()
    tensors = module.state_dict()
    del tensors["fc.bias"]
    save_file(tensors, tmp_path / "mine.safetensors")
    assert command.main(given) == 1
    printed = capsys.readouterr().out
    assert printed.startswith(f"FAIL {NAME}: ")
    assert "mine.safetensors" in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / f"{NAME}.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["timm/resnet50dd"], "did you mean timm/resnet50d"),
        (["nothing/like-it"], "nothing/like-it is not in the zoo; docs/zoo.md lists it"),
        ([], "name a variant, or give --all or --render"),
        (["--weights=x", "timm/resnet18", "timm/resnet34"], "--weights goes with one NAME"),
        (["--render", "--out=nowhere"], "nowhere has no certificates: make them with --all first"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert list(tmp_path.iterdir()) == []


def test_any_architecture_of_timm_and_builder_of_torchvision_has_an_entry():
    entry = zoo.find_entry("timm/resnet50c")
    assert (entry.build, entry.source, entry.image_size) == ("resnet50c", "timm", 224)
    assert zoo.find_entry("torchvision/regnet_y_128gf").source == "torchvision"


def test_the_whole_size_of_what_is_certified_in_part():
    entry = Entry("torchvision/x", "RegNetX", "regnet_x_400mf", reduced=(("num_classes", 3),))
    family, arguments = full_arguments(entry)
    assert (family, arguments["num_classes"], arguments["depths"]) == (
        "regnet",
        1000,
        (1, 2, 7, 12),
    )


def test_a_map_with_as_many_channels_as_rows_is_compared_in_either_order(rng):
    ours = rng.normal(size=(2, 5, 5, 5))
    assert relative_error(ours, ours) == relative_error(ours, ours.transpose(0, 3, 1, 2)) == 0
    assert relative_error(ours, ours.transpose(0, 2, 1, 3)) > 0.1
