"""Reading weights: files, folders, shards, the package, the hub; and every way they are broken."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hub_server import COMMIT, REPOSITORY, serve

from vision_jax.convert import read_weights, write_safetensors
from vision_jax.convert.read import read_preprocessing
from vision_jax.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden"


def fails(spec, *words, **arguments):
    with pytest.raises(UserError) as caught:
        read_weights(str(spec), **arguments)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_file_comes_with_its_hash_and_nothing_else(tmp_path, rng):
    tensors = {"a": rng.normal(size=(2, 3)).astype(np.float32)}
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors)
    (tmp_path / "config.json").write_text("another model's")
    weights = read_weights(str(path))
    assert weights.origin == str(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert weights.metadata == {}
    assert weights.preprocessing is None
    np.testing.assert_array_equal(weights.tensors["a"], tensors["a"])


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_becomes_float32_exactly(dtype, tmp_path, rng):
    values = rng.normal(size=(5, 3)).astype(dtype)
    write_safetensors(tmp_path / "x.safetensors", {"a": values})
    read = read_weights(str(tmp_path / "x.safetensors")).tensors["a"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_truncated_file_is_named(keep, tmp_path, rng):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": rng.normal(size=(8, 8))})
    path.write_bytes(path.read_bytes()[:keep])
    fails(path, str(path), "damaged", "again")


def test_names_of_a_tied_tensor_are_followed(tmp_path, rng):
    """What safetensors.torch.save_model notes of tensors that share their memory."""
    path = tmp_path / "x.safetensors"
    tensors = {"a": rng.normal(size=(2, 3)).astype(np.float32)}
    write_safetensors(path, tensors, {"format": "pt", "b": "a", "c": "nothing", "a": "a"})
    found = read_weights(str(path)).tensors
    assert set(found) == {"a", "b"}
    np.testing.assert_array_equal(found["b"], tensors["a"])


def test_random_bytes_are_no_safetensors(tmp_path, rng):
    path = tmp_path / "x.safetensors"
    for _ in range(20):
        path.write_bytes(rng.bytes(int(rng.integers(1, 200))))
        fails(path, str(path))


def test_what_is_not_there(tmp_path):
    fails(tmp_path / "none.safetensors", "no such file")
    fails(tmp_path, "model.safetensors", "pytorch_model.bin")
    fails(
        "embedded:nothing",
        "the package has no such weights, only fashion_generator, nanodet_coco, vit_cifar10",
    )
    fails("embedded:../errors.py", "no such weights")
    fails("hf://nothing", "hf://owner/name")
    fails("hf://../../etc", "hf://owner/name")


def test_a_folder_brings_config_and_preprocessing():
    weights = read_weights(str(GOLDEN / "timm_deit_distilled"))
    assert weights.metadata["config"]["architecture"] == "deit_tiny_distilled_patch16_224"
    assert weights.preprocessing == {
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "image_size": (12, 12),
        "crop_pct": 0.9,
        "crop_mode": "center",
        "crop_rule": "torchvision",
        "interpolation": "bicubic",
    }


def test_broken_configs_are_named(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(1)})
    for text, word in [("{", "as JSON"), ("[1]", "list"), ("[" * 100_000, "as JSON")]:
        (tmp_path / "config.json").write_text(text)
        fails(tmp_path, "config.json", word)
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": "grey"}}))
    fails(tmp_path, "mean", "grey")


def shard(folder, files, weight_map=None):
    for name, tensors in files.items():
        write_safetensors(folder / name, tensors)
    weight_map = weight_map or {key: name for name, part in files.items() for key in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_joined(tmp_path):
    parts = [{"a": np.ones(2)}, {"b": np.zeros((2, 2)), "c": np.arange(3.0)}]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    shard(tmp_path, dict(zip(names, parts, strict=True)))
    weights = read_weights(str(tmp_path))
    assert sorted(weights.tensors) == ["a", "b", "c"]
    joined = b"".join((tmp_path / name).read_bytes() for name in names)
    assert weights.sha256 == hashlib.sha256(joined).hexdigest()


@pytest.mark.parametrize(
    ("weight_map", "word"),
    [
        ({"a": "../out.safetensors"}, "../out.safetensors"),
        ({"a": "/etc/passwd"}, "/etc/passwd"),
        ({"a": "model.bin"}, "model.bin"),
        ({"a": "model-2.safetensors"}, "missing"),
        ({"a": f"{'m' * 300}.safetensors"}, "missing"),  # too long for a file's name
        ({}, "weight_map"),
    ],
)
def test_shards_stay_inside_the_folder(weight_map, word, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_safetensors(tmp_path / "out.safetensors", {"a": np.ones(1)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    fails(folder, word)


def test_the_same_tensor_in_two_shards(tmp_path):
    shard(tmp_path, {"model-1.safetensors": {"a": np.ones(1)}}, {"a": "model-1.safetensors"})
    shard(
        tmp_path,
        {"model-2.safetensors": {"a": np.ones(1)}},
        {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    )
    fails(tmp_path, "tensor a is in another shard")


@pytest.mark.parametrize("name", ["x.pth", "x.pt", "pytorch_model.bin"])
def test_a_pickle_is_not_touched_unless_asked(name, tmp_path):
    (tmp_path / name).write_bytes(b"cposix\nsystem\n(S'touch owned'\ntR.")
    fails(tmp_path / name, "--config.model.allow_pickle=True", ".safetensors")
    if name == "pytorch_model.bin":
        fails(tmp_path, "--config.model.allow_pickle=True")


def test_without_torch_a_pickle_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "x.pth").write_bytes(b"")
    fails(tmp_path / "x.pth", "vision_jax[torch]", allow_pickle=True)


TIMM = {"mean": [0.4, 0.41, 0.42], "std": [0.2, 0.21, 0.22], "interpolation": "bilinear"} | {
    "input_size": [3, 20, 24],
    "crop_pct": 0.9,
}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (TIMM, {"mean": (0.4, 0.41, 0.42), "image_size": (20, 24), "crop_pct": 0.9}),
        (TIMM, {"interpolation": "bilinear", "crop_mode": "center", "crop_rule": "torchvision"}),
        ({"pretrained_cfg": {}}, {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}),
        ({"pretrained_cfg": {"crop_mode": "border", "mean": None}}, {"crop_mode": "border"}),
        (
            {"pretrained_cfg": TIMM | {"fixed_input_size": True}, "model_args": {"img_size": 32}},
            {"image_size": (32, 32)},
        ),
        (
            {"pretrained_cfg": TIMM | {"mean": [0.5], "std": [0.5]}, "model_args": {"in_chans": 5}},
            {"mean": (0.5,) * 5, "std": (0.5,) * 5},
        ),
    ],
)
def test_timms_config_in_its_forms(config, expected):
    """Before timm 0.8 it was flat; what is left out is timm's default and not the family's."""
    found = read_preprocessing({"config": {"architecture": "resnet18"} | config})
    assert {key: found[key] for key in expected} == expected


def test_a_config_that_says_nothing_of_images():
    assert read_preprocessing({"config": {"architecture": "resnet18", "num_classes": 3}}) is None
    with pytest.raises(UserError, match=r"config\.json: images of 9223372036854775807 channels"):
        read_preprocessing({"config": {"pretrained_cfg": {"input_size": [2**63 - 1, 8, 8]}}})


def test_the_processor_of_models_of_several_inputs_goes_first(tmp_path):
    """transformers 5 writes a CLIPProcessor's into processor_config.json."""
    write_safetensors(tmp_path / "model.safetensors", {"a": np.ones(1)})
    inner = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 48}}
    inner["crop_size"] = 40
    outer = {"image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(outer))
    other = {"processor_class": "CLIPProcessor", "image_processor": inner}
    (tmp_path / "processor_config.json").write_text(json.dumps(other))
    assert read_weights(str(tmp_path)).preprocessing["image_size"] == (40, 40)
    inner["do_resize"] = False
    (tmp_path / "processor_config.json").write_text(json.dumps(other))
    fails(tmp_path, str(tmp_path), "processor_config.json: do_resize False")


PROGRAM = """
import sys
from vision_jax.convert import read_weights
from vision_jax.errors import UserError
for spec in map(str.strip, sys.stdin):
    try:
        weights = read_weights(spec)
        print(weights.sha256, weights.metadata["config"]["model_type"], weights.origin, flush=True)
    except UserError as error:
        print("UserError:", error, flush=True)
"""


@contextlib.contextmanager
def reader(**environment):
    """read_weights in a process of its own, since the hub's settings are read at import."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1", **environment},
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def ask(spec):
        process.stdin.write(f"{spec}\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with process:
        yield ask
        process.stdin.close()
    assert process.returncode == 0


@pytest.mark.long
def test_the_hub_then_its_cache_when_the_hub_is_gone(tmp_path):
    path = GOLDEN / "transformers_clip" / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    spec, unknown = f"hf://{REPOSITORY}", "hf://nobody/nothing"
    repository = tmp_path / "repository"
    shutil.copytree(path.parent, repository)
    shutil.copytree(path.parent, repository / "part")  # as a pipeline has its models
    server = serve(repository)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    places = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}",
        "HF_HOME": str(tmp_path),
    }
    with reader(**places) as ask, reader(**places, HF_HUB_OFFLINE="1") as ask_offline:
        try:
            assert ask_offline(spec).startswith(f"UserError: {spec}: not in the cache")
            assert ask(unknown).startswith(f"UserError: {unknown}: the hub has no such model")
            assert ask(spec) == f"{digest} clip_vision_model {spec}"
            pinned = f"{spec}@{COMMIT}"
            assert ask(pinned) == f"{digest} clip_vision_model {pinned}"
            assert ask_offline(spec) == f"{digest} clip_vision_model {spec}"
            assert ask_offline(f"{spec}/part").startswith("UserError: ")
            assert ask(f"{spec}/part") == f"{digest} clip_vision_model {spec}/part"
            assert ask_offline(f"{spec}/part") == f"{digest} clip_vision_model {spec}/part"
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
        assert ask(spec) == f"{digest} clip_vision_model {spec}"
        assert ask(unknown).startswith(f"UserError: {unknown}: not in the cache")


def test_safetensors_written_elsewhere_are_read(tmp_path, rng):
    tensors = {"x": rng.normal(size=(3, 1)).astype(np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    assert read_weights(str(tmp_path / "x.safetensors")).tensors["x"].shape == (3, 1)
