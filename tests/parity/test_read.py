"""Pickled checkpoints, for which torch itself is needed."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_jax.convert import read_weights
from vision_jax.errors import UserError

TENSORS = {"a.weight": torch.randn(3, 2), "a.bias": torch.randn(3)}


def fails(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_weights(str(path), allow_pickle=True)
    assert "\n" not in str(caught.value)
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "wrapper",
    [None, "state_dict", "model", "model_ema", "ema", "net", "params_ema", "teacher", "mine"],
)
@pytest.mark.parametrize("prefix", ["", "module.", "module.model.", "_orig_mod.", "backbone."])
def test_wrappers_and_prefixes_come_off(wrapper, prefix, tmp_path):
    tensors = {f"{prefix}{name}": value for name, value in TENSORS.items()}
    content = {wrapper: tensors, "epoch": 3} if wrapper else tensors
    torch.save(content, tmp_path / "x.pth")
    weights = read_weights(str(tmp_path / "x.pth"), allow_pickle=True)
    assert set(weights.tensors) == set(TENSORS)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(weights.tensors[name], value.numpy())


def test_wrappers_inside_wrappers_beside_a_programs_other_things(tmp_path):
    moments = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": [{"lr": 0.1}]}
    content = {"epoch": 3, "optimizer": moments, "ema": {"decay": 0.9, "module": TENSORS}}
    others = {name: -value for name, value in TENSORS.items()}
    torch.save(content | {"model": others}, tmp_path / "x.pth.tar")
    weights = read_weights(str(tmp_path / "x.pth.tar"), allow_pickle=True)
    assert set(weights.tensors) == set(TENSORS)  # the averaged ones, as timm takes them
    np.testing.assert_array_equal(weights.tensors["a.bias"], TENSORS["a.bias"].numpy())


@pytest.mark.parametrize("loss", [0.3, torch.tensor(0.3)])
def test_pytorchs_tutorial(loss, tmp_path):
    moments = {"state": {0: {"exp_avg": torch.randn(3)}}, "param_groups": []}
    content = {"epoch": 1, "optimizer_state_dict": moments, "loss": loss}
    torch.save(content | {"model_state_dict": TENSORS}, tmp_path / "x.pth")
    weights = read_weights(str(tmp_path / "x.pth"), allow_pickle=True)
    assert set(weights.tensors) == set(TENSORS)


def test_which_of_several_models_is_for_a_person_to_say(tmp_path):
    torch.save({"generator": TENSORS, "critic": TENSORS, "step": 3}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "generator, critic")


def test_torchs_averaged_model_and_a_programs_flags(tmp_path):
    """What torchvision's and timm's own training scripts save."""
    model = torch.nn.Linear(2, 3)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    flags = argparse.Namespace(lr=0.1, model="x")
    content = {"model": model.state_dict(), "model_ema": averaged.state_dict(), "args": flags}
    torch.save(content, tmp_path / "x.pth")
    weights = read_weights(str(tmp_path / "x.pth"), allow_pickle=True)
    assert set(weights.tensors) == {"weight", "bias"}


def test_a_prefix_of_some_tensors_is_part_of_their_names(tmp_path):
    torch.save({"module.a": TENSORS["a.bias"], "b": TENSORS["a.bias"]}, tmp_path / "x.pt")
    weights = read_weights(str(tmp_path / "x.pt"), allow_pickle=True)
    assert set(weights.tensors) == {"module.a", "b"}


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch(zipped, tmp_path):
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    weights = read_weights(str(tmp_path / "x.pt"), allow_pickle=True)
    np.testing.assert_array_equal(weights.tensors["a.weight"], TENSORS["a.weight"].numpy())


@pytest.mark.parametrize("tensor", [torch.ones(3, 3).to_sparse(), torch.ones(2).cfloat()], ids=str)
def test_tensors_that_no_model_has(tensor, tmp_path):
    torch.save({"odd.one": tensor}, tmp_path / "x.pt")
    fails(tmp_path / "x.pt", "odd.one")


def test_half_precision_becomes_float32(tmp_path):
    torch.save({"a": TENSORS["a.bias"].bfloat16()}, tmp_path / "x.pt")
    read = read_weights(str(tmp_path / "x.pt"), allow_pickle=True).tensors["a"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, TENSORS["a.bias"].bfloat16().float().numpy())


class Payload:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_a_pickle_that_runs_code_does_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": TENSORS["a.bias"], "b": Payload()}, tmp_path / "x.pth")
    (tmp_path / "y.bin").write_bytes(pickle.dumps(Payload()))
    for name in ("x.pth", "y.bin"):
        fails(tmp_path / name, "not a file of weights alone")
    assert not (tmp_path / "owned").exists()


def test_errors_keep_torchs_advice_to_themselves(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "torch.nn.modules.linear.Linear")
    with pytest.raises(UserError) as caught:
        read_weights(str(tmp_path / "x.pth"), allow_pickle=True)
    assert "weights_only" not in str(caught.value)


def test_a_tensor_larger_than_its_file(tmp_path):
    torch.save({"a": torch.zeros(1).expand(2**20, 2**20)}, tmp_path / "x.pth")
    fails(tmp_path / "x.pth", "of which the file has fewer")


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, torch.randn(3)])
def test_a_pickle_that_is_not_weights(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    fails(tmp_path / "x.pth")


def test_damaged_pickles(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    whole = (tmp_path / "x.pth").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"hello"):
        (tmp_path / "x.pth").write_bytes(content)
        fails(tmp_path / "x.pth")
