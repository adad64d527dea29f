import re
import warnings

import pytest
import runs
from ml_collections import ConfigDict

from vision_jax.config import (
    check_ranges,
    differences,
    fields,
    load_config,
    nearest,
    read_json,
    save_config,
)
from vision_jax.errors import UserError

CONFIG = str(runs.ROOT / "configs/vit_lora.py")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optim.lr", "0.5", 0.5),
        ("optim.lr", "1", 1.0),
        ("batch_size", "32", 32),
        ("lora.dora", "True", True),
        ("lora.dora", "false", False),
        ("data.eval", "", ""),
        ("data.eval", "123", "123"),
        ("trainable", ".*", (".*",)),
        ("trainable", "", ()),
        ("lora.rules", r"block_\d+/mlp/(fc1|fc2)/kernel", (r"block_\d+/mlp/(fc1|fc2)/kernel",)),
        ("lora.rules", r"('a\d', 'b')", (r"a\d", "b")),
        ("lora.rules", "['a']", ("a",)),
        ("lora.rules", "()", ()),
        ("mesh.fsdp", "2", 2),
        ("model.mean", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
    ],
)
def test_overrides_have_the_type_of_the_field(name, text, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_config(CONFIG, {name: text})
    found = fields(config)[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("optim.lrr", "1", "unknown config key `optim.lrr`: did you mean `optim.lr`?"),
        ("optim", "1", "unknown config key `optim`"),
        ("optim.lr.x", "1", "unknown config key"),
        ("batch_size", "1.5", "takes int (now 64), not '1.5'"),
        ("batch_size", "True", "takes int"),
        ("batch_size", "many", "takes int"),
        ("optim.lr", "fast", "takes float"),
        ("optim.lr", "True", "takes float"),
        ("lora.dora", "1", "takes bool"),
        ("trainable", "3", "takes tuple"),
        ("optim.lr", "{[]: 1}", "takes float"),
        ("optim.lr", "(" * 500, "takes float"),
    ],
)
def test_bad_overrides_are_one_line(name, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(CONFIG, {name: text})
    assert "\n" not in str(caught.value)


def test_a_config_is_locked():
    config = load_config(CONFIG, {})
    with pytest.raises(AttributeError):
        config.optim.learning_rate = 1.0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        ("x = 1", "defines no get_config"),
        ("def get_config(:", "is no Python file"),
    ],
)
def test_bad_config_files(tmp_path, content, message):
    path = tmp_path / "config.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_config(str(path), {})


def test_json_brings_back_the_same_config(tmp_path):
    config = load_config(str(runs.ROOT / "configs/vit_pretrain_cifar10.py"), {})
    save_config(config, tmp_path / "config.json")
    again = load_config(str(tmp_path / "config.json"), {})
    assert fields(again) == fields(config)
    assert {n: type(v) for n, v in fields(again).items()} == {
        n: type(v) for n, v in fields(config).items()
    }
    assert differences(config, again) == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[1]", b"\xff\xfe", b"null"])
def test_damaged_json(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json(: not readable as JSON| is damaged)"):
        read_json(tmp_path / "config.json")


def test_differences_name_the_fields():
    old = ConfigDict({"a": 1, "b": {"c": 2.0, "gone": 0}})
    new = ConfigDict({"a": 1, "b": {"c": 3.0}})
    assert differences(old, new) == ["b.c: 2.0 -> 3.0", "b.gone: 0 -> None"]


def test_nearest():
    assert nearest("optm.lr", ["optim.lr", "seed"]) == ": did you mean `optim.lr`?"
    assert nearest("zzz", ["optim.lr"]) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("total_steps", -1),
        ("seed", -1),
        ("log_every", 0),
        ("checkpoint_every", 0),
        ("evaluate.every", -1),
        ("evaluate.batch_size", 0),
        ("optim.accumulate", 0),
        ("optim.ema_decay", 1.0),
        ("model.drop_path", 1.0),
        ("model.dropout", float("nan")),
        ("model.mean", ("a", 0.5)),
        ("evaluate.shots", ()),
        ("evaluate.neighbors", (0,)),
        ("model.std", ("a", "b", "c")),
        ("data.max_damaged", 1.5),
        ("data.crop_scale", (0.5, 0.1)),
        ("augment.policy", "rando"),
        ("augment.magnitude", 31),
        ("augment.mixup", -1.0),
        ("augment.label_smoothing", 2.0),
        ("lora.rules", (1,)),
        ("model.arguments", ("pool", "avg")),
    ],
)
def test_values_out_of_range_are_named(name, value):
    config = ConfigDict(load_config(CONFIG, {}).to_dict())
    check_ranges(config)
    *parents, last = name.split(".")
    below = config
    for parent in parents:
        below = below[parent]
    below[last] = value
    with pytest.raises(UserError, match=re.escape(f"config.{name} is ")):
        check_ranges(config)
