import itertools
import json
import re
import shutil
import time
import warnings

import pytest
import runs
from ml_collections import ConfigDict

from vision_jax import optim
from vision_jax.config import (
    check_ranges,
    default_config,
    differences,
    fields,
    fields_of,
    load_config,
    read_config,
    read_json,
    save_config,
)
from vision_jax.config.fields import FIELDS, FILTERS, RECIPES, TASKS
from vision_jax.config.hints import ELSEWHERE, RENAMED, WORDS, suggest
from vision_jax.config.literals import read_literal
from vision_jax.config.show import explain, show
from vision_jax.data import pipeline, transforms
from vision_jax.errors import UserError, UserErrors, nearest
from vision_jax.models.families import DTYPES

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
        ("model.reinitialize", "()", ()),
        ("mesh.fsdp", "2", 2),
        ("model.mean", "(0.1, 0.2, 0.3)", (0.1, 0.2, 0.3)),
        ("optim.lr", "1/8", 0.125),
        ("optim.lr", " 2e-3 * 2 ", 0.004),
        ("optim.lr", "2**-10", 2**-10),
        ("adversarial.epsilon", "8/255", 8 / 255),
        ("total_steps", "10_000", 10_000),
        ("total_steps", "1e3", 1000),
        ("total_steps", "5 * 64", 320),
        ("robustness.epsilons", "(2/255,)", (2 / 255,)),
        ("robustness.epsilons", "8/255", (8 / 255,)),
        ("robustness.epsilons", "[1/255, -(-2)/255]", (1 / 255, 2 / 255)),
        ("lora.dora", "TRUE", True),
        ("data.eval", "''", ""),
        ("data.train", '"a b/c"', "a b/c"),
        ("recipes", "lora", ("lora",)),
        ("optim.lr_multipliers", "(('head/.*', 1/2),)", (("head/.*", 0.5),)),
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
        ("trainable", "3", "config.trainable is (3,): it must be a tuple of regular expressions"),
        ("trainable", "None", "takes tuple"),
        ("trainable", "(head", "it must be a tuple of regular expressions"),
        ("batch_size", "1e20", "must be at least 1 and below 2**31"),
        ("batch_size", "2.0**40", "must be at least 1 and below 2**31"),
        ("optim.lr", "1/0", "takes float"),
        ("optim.lr", "9**9**9", "takes float"),
        ("optim.lr", "(-8)**0.5", "takes float"),
        ("optim.lr", "__import__('os')", "takes float"),
        ("optim.lr", "None", "takes float"),
        ("optim.lr", "", "takes float"),
        ("model.weights", "None", "takes text, not None: --config.model.weights= is empty"),
        ("recipes", "('lora', 'lora')", "each at most once"),
        (
            "recipes",
            "('lora', 'adversarail')",
            "a tuple of mask, quantize, lora, distill, adversarial",
        ),
        ("optim", "1", "it is a section, set one of its fields, such as `optim.name`"),
        ("optim.name", "adam", "config.optim.name is 'adam': it must be adamw, sgd, "),
        ("optim.warmup_steps", "300", "the run has 200 updates"),
        ("optim.accumulate", "3", "does not divide"),
        ("task", "detection", "is a config of classification"),
        ("optim.lr", "{[]: 1}", "takes float"),
        ("optim.lr", "(" * 500, "takes float"),
    ],
)
def test_bad_overrides_are_one_line(name, text, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_config(CONFIG, {name: text})
    assert "\n" not in str(caught.value)


def test_checks_answer_whatever_a_tuple_holds():
    """A config.json may hold anything: a check says no, and raises nothing."""
    odd = ({}, [], {"a": [1]}, None, True, 1.5, 2**70, "x", (), ((),), ([], {}), ("a", {}, [], 1))
    for field in FIELDS:
        if isinstance(field.default, tuple):
            for first, second in itertools.product(odd, repeat=2):
                for value in ((first,), (first, second)):
                    assert field.check.fits(value) in (True, False), (field.name, value)


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
        ("import nothing_of_that_name", r"config.py:1: ModuleNotFoundError"),
        ("def get_config():\n    return 1 / 0", r"config.py:2: ZeroDivisionError"),
        ("def get_config():\n    return {}", "must return a ConfigDict"),
        (
            "from vision_jax.config import default_config\n"
            "def get_config():\n    config = default_config('classification')\n"
            "    config.optim.learning_rate = 1.0\n    return config\n",
            r"config.py:4: .*`optim.learning_rate`: did you mean `optim.lr`?",
        ),
        ("raise SystemExit(0)", "config.py:1: SystemExit: 0"),
        (
            "from vision_jax.config import default_config as get_config",
            "takes no argument|required",
        ),
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


def test_all_that_is_wrong_is_told_at_once():
    wrong = {"batch_size": "0", "optim.lrr": "1", "optim.lr": "fast", "augment.policy": "auto"}
    with pytest.raises(UserErrors) as caught:
        load_config(CONFIG, wrong)
    lines = [str(error) for error in caught.value.each]
    assert len(lines) == 4
    for name in ("batch_size", "optim.lrr", "key `optim.lr`", "augment.policy"):
        assert sum(name in line for line in lines) == 1
    wrong = {"optim.lr": "-1", "batch_size": "8", "optim.accumulate": "3", "lora.rank": "0"}
    wrong |= {"total_steps": "10", "optim.warmup_steps": "20", "data.holdout": "7"}
    with pytest.raises(UserErrors) as caught:  # what doesn't go together, too
        load_config(CONFIG, wrong)
    lines = [str(error) for error in caught.value.each]
    assert len(lines) == 5
    for name in ("optim.lr is", "optim.accumulate 3", "lora.rank", "warmup_steps is 20", "holdout"):
        assert sum(name in line for line in lines) == 1


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("optim.weight-decay", "optim.weight_decay"),
        ("epochs", "total_steps"),
        ("num_train_epochs", "total_steps"),
        ("optim.epochs", "total_steps"),
        ("max_steps", "total_steps"),
        ("bs", "batch_size"),
        ("data.batch_size", "batch_size"),
        ("lora.r", "lora.rank"),
        ("rank", "lora.rank"),
        ("lora.target_modules", "lora.rules"),
        ("model.pretrained", "model.weights"),
        ("weights", "model.weights"),
        ("step", "total_steps"),  # and not the old name of adversarial.step_size
        ("rates", "optim.lr_multipliers"),
        ("model.img_size", "model.image_size"),
        ("optimizer", "optim.name"),
        ("warmup", "optim.warmup_steps"),
        ("label_smoothing", "augment.label_smoothing"),
        ("gradient_accumulation_steps", "optim.accumulate"),
        ("optim.lrr", "optim.lr"),
        ("modle.dtype", "model.dtype"),
        ("model.name", "model.variant"),
        ("data.root", "data.train"),
    ],
)
def test_hints_name_the_field_that_is_meant(typed, meant):
    with pytest.raises(UserError, match=re.escape(f"`{typed}`: did you mean `{meant}`?")) as caught:
        load_config(CONFIG, {typed: "1"})
    assert ("an epoch is" in str(caught.value)) == ("epoch" in typed)


def test_hints_are_fields_and_no_field_is_somebody_elses_word():
    names = {field.name for field in FIELDS}
    assert set(WORDS) <= names
    words = [word for words in [*WORDS.values(), *ELSEWHERE.values()] for word in words.split()]
    assert len(set(words)) == len(words)
    assert "the flag --workdir=DIR" in suggest("train.output_dir", sorted(names))
    assert "classes are counted" in suggest("model.num_classes", sorted(names))
    assert "`evaluate.stop_after`" in suggest("patience", sorted(names))
    assert suggest("old_field", sorted(names)) == ""
    assert suggest("nothing_like_it_at_all_xyz", sorted(names)) == ""


@pytest.mark.parametrize("text", ["1" * 5000, "10**60", "2**65", "-(2**64)", "a", "[1, b]", "f(1)"])
def test_literals_are_bounded(text):
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"beyond|digits|no literal"):
        read_literal(text)
    assert time.monotonic() - start < 5


def test_a_field_that_was_renamed_names_the_new_one(tmp_path):
    """Old names of RENAMED; what else is asked of a command line, a config and a JSON file."""
    said = "`optim.rates`: it is `optim.lr_multipliers` now"
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(CONFIG, {"optim.rates": "()"})
    (tmp_path / "mine.json").write_text('{"optim": {"rates": []}}')
    with pytest.raises(UserError, match=re.escape(said)):
        load_config(str(tmp_path / "mine.json"), {})
    (tmp_path / "mine.py").write_text(
        "from vision_jax.config import default_config\n"
        "def get_config():\n    config = default_config('detection')\n"
        "    config.optim.rates = ()\n    return config\n"
    )
    with pytest.raises(UserError, match=rf"mine.py:4: .*{re.escape(said)}"):
        load_config(str(tmp_path / "mine.py"), {})
    names = {field.name for field in FIELDS}
    assert set(RENAMED.values()) <= names
    assert not names & set(RENAMED)


def test_an_older_runs_renamed_field_keeps_its_value(older):
    def change(config):
        del config["optim"]["lr_multipliers"]
        config["optim"]["rates"] = [["head/.*", 0.5]]

    reading = read_config(older(change), {})
    config, notes = reading.config, reading.notes
    assert config.optim.lr_multipliers == (("head/.*", 0.5),)
    (note,) = notes
    assert note.endswith("optim.rates is optim.lr_multipliers now, and keeps its value")


def test_a_task_is_one_more_line_of_the_list(monkeypatch, tmp_path):
    with pytest.raises(UserError, match=r"'dummy' is none of classification, detection, segm"):
        default_config("dummy")
    monkeypatch.setitem(TASKS, "dummy", "nowhere")
    monkeypatch.setitem(RECIPES, "shake", "nowhere")
    (tmp_path / "mine.json").write_text('{"task": "dummy", "recipes": ["shake"]}')
    config = load_config(str(tmp_path / "mine.json"), {})
    assert (config.task, config.recipes) == ("dummy", ("shake",))
    shared = {field.name for field in FIELDS if field.tasks is None}
    assert fields(config).keys() == fields_of("dummy").keys() == shared
    with pytest.raises(
        UserError, match="must be a tuple of mask, quantize, lora, distill, adversarial, shake"
    ):
        load_config(str(tmp_path / "mine.json"), {"recipes": "shale"})
    assert fields_of("classification")["task"].check.wanted.endswith("generation or dummy")


def test_defaults_are_in_range_and_every_field_is_explained():
    for task in TASKS:
        table = fields_of(task)
        assert sum(task in (field.tasks or TASKS) for field in FIELDS) == len(table)  # each once
        for name, field in table.items():
            assert field.check.fits(field.default), name
            assert field.help, name


def test_choices_are_those_of_the_code():
    table = fields_of("classification")
    for name, choices in (
        ("optim.name", optim.OPTIMIZERS),
        ("optim.schedule", optim.SCHEDULES),
        ("data.crop", pipeline.CROPS),
        ("model.dtype", DTYPES),
    ):
        assert all(map(table[name].check.fits, choices)), name
        assert table[name].check.wanted == f"{', '.join([*choices][:-1])} or {[*choices][-1]}"
    assert tuple(transforms.INTERPOLATIONS) == FILTERS


@pytest.fixture
def older(tmp_path):
    """A function (change of a run's config.json) -> its path."""

    def write(change):
        config = load_config(CONFIG, {"optim.lr": "0.5"}).to_dict()
        change(config)
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "model.json").write_text("{}")
        return str(tmp_path / "config.json")

    return write


def test_an_older_runs_config_is_filled_with_todays_defaults(older):
    def change(config):
        del config["optim"]["lr_multipliers"]
        del config["distill"]

    reading = read_config(older(change), {"distill.weight": "0.25"})
    config, notes = reading.config, reading.notes
    assert reading.origins["distill.temperature"] == "filled in"
    assert reading.origins["distill.weight"] == "command line"
    assert reading.origins["optim.lr"] == reading.origins["seed"] == "run's config.json"
    wanted = load_config(CONFIG, {"optim.lr": "0.5", "distill.weight": "0.25"})
    assert differences(wanted, config) == []
    (note,) = notes
    assert "config.json lacks fields" in note
    assert "distill.*, optim.lr_multipliers = ()" in note


def test_fields_that_an_older_run_had_are_named_and_left_out(older):
    def change(config):
        config["optim"]["nesterov"] = True
        config["old"] = {"a": 1, "b": 2}

    reading = read_config(older(change), {})
    config, notes = reading.config, reading.notes
    assert differences(load_config(CONFIG, {"optim.lr": "0.5"}), config) == []
    assert len(notes) == 1
    assert "left out: old.a, old.b, optim.nesterov" in notes[0]


def test_a_users_json_is_filled_and_its_mistakes_are_told(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"batch_size": 32.0, "optim": {"lr": 1}, "recipes": []}))
    reading = read_config(str(path), {})
    config, notes = reading.config, reading.notes
    assert (config.batch_size, config.optim.lr, config.recipes) == (32, 1.0, ())
    assert {n: type(v) for n, v in fields(config).items()} == {
        n: type(f.default) for n, f in fields_of("classification").items()
    }
    assert "mine.json lacks fields" in notes[0]
    path.write_text(json.dumps({"batch_size": "32", "optim": {"learning_rate": 1}, "model": 3}))
    with pytest.raises(UserErrors) as caught:
        read_config(str(path), {})
    said = sorted(map(str, caught.value.each))
    assert len(said) == 3
    assert "config.batch_size is '32': it takes int" in said[0]
    assert "`model`: it is a section" in said[1]
    assert "did you mean `optim.lr`?" in said[2]


def test_a_short_run_shortens_a_warm_up_that_nobody_asked_for(tmp_path):
    reading = read_config(CONFIG, {"total_steps": "10"})
    config, notes = reading.config, reading.notes
    assert config.optim.warmup_steps == 1  # a tenth of the run, as in the file
    assert notes == (
        "optim.warmup_steps is 1 and not 20, for total_steps is 10 and not 200; "
        "--config.optim.warmup_steps sets another",
    )
    assert reading.origins["optim.warmup_steps"] == "filled in"
    assert load_config(CONFIG, {"total_steps": "20"}).optim.warmup_steps == 20
    with pytest.raises(UserError, match=r"warmup_steps is 20 and the run has 10 updates"):
        load_config(CONFIG, {"total_steps": "10", "optim.warmup_steps": "20"})
    save_config(config, tmp_path / "config.json")
    again = read_config(str(tmp_path / "config.json"), {})
    assert (differences(config, again.config), again.notes) == ([], ())
    (tmp_path / "mine.json").write_text('{"total_steps": 50}')  # the default's 100 of 1,000
    assert load_config(str(tmp_path / "mine.json"), {}).optim.warmup_steps == 5


def test_configs_that_come_along_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/vit_lora.py", {}).lora.rank == 8
    assert load_config("./configs/detr_tiny.py:composites", {}).data.max_boxes == 12
    with pytest.raises(UserError, match=r"did you mean `configs/vit_lora.py`"):
        load_config("vit_lora", {})
    with pytest.raises(UserError, match=r"the package brings configs/[a-z_]+.py, configs/"):
        load_config("xyz", {})
    with pytest.raises(UserError, match=r"fields are set with --config.FIELD=VALUE"):
        load_config("optim.lr=1", {})
    (tmp_path / "configs").mkdir()  # somebody's own folder comes first
    shutil.copy(runs.ROOT / "configs/vit_lora_pgd.py", tmp_path / "configs/vit_lora.py")
    assert "adversarial" in load_config("configs/vit_lora.py", {}).recipes


def test_fields_are_shown_with_where_they_come_from(tmp_path):
    lines = show(read_config(CONFIG, {"batch_size": "32"}))
    names = [line.split(" = ")[0] for line in lines]
    assert names == [*fields_of("classification")]
    shown = dict(zip(names, lines, strict=True))
    for name, value, origin in (
        ("optim.lr", "0.005", "file"),
        ("batch_size", "32", "command line"),
        ("seed", "0", "default"),
    ):
        assert re.match(rf"{name} = {value} +{origin} +# \w", shown[name]), shown[name]
    (tmp_path / "mine.json").write_text('{"seed": 0, "batch_size": 16}')
    origins = read_config(str(tmp_path / "mine.json"), {}).origins
    assert (origins["batch_size"], origins["log_every"]) == ("file", "default")


def test_help_of_a_field_a_section_and_all():
    assert explain("optim.lr") == [
        "optim.lr",
        "  help     the peak of the learning rate",
        "  default  0.001; of detection 0.0001",
        "  type     float, at least 0, and finite",
        "  tasks    classification, detection, segmentation, pretraining, self_distillation, "
        "contrastive, image_text, generation",
    ]
    assert [line for line in explain("data.crop") if "tasks" in line] == [
        "  tasks    classification, pretraining, self_distillation, contrastive, image_text, "
        "generation",
        "  tasks    detection",
    ]
    section = [line for line in explain("loss") if not line.startswith(" ")]
    assert section == [field.name for field in FIELDS if field.name.startswith("loss.")]
    assert len(explain("")) == 5 * len(FIELDS)
    for wrong, meant in (
        ("learning_rate", "optim.lr"),
        ("optm", "optim"),
        ("lora.rnk", "lora.rank"),
    ):
        with pytest.raises(UserError, match=rf"section `{wrong}`: did you mean `{meant}`\?"):
            explain(wrong)


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


def test_recipes_in_a_senseless_order_are_refused_with_the_order_that_has_sense(tmp_path):
    taught = {"distill.teachers": "ema", "optim.ema_decay": "0.9"}
    good = {"recipes": "('lora', 'distill', 'adversarial')", **taught}
    assert load_config(CONFIG, good).recipes == ("lora", "distill", "adversarial")
    for recipes in ("('adversarial', 'lora')", "('lora', 'adversarial', 'distill')"):
        with pytest.raises(UserError, match=r"write .*'lora', .*'adversarial'") as caught:
            load_config(CONFIG, {**good, "recipes": recipes})
        assert "in their order" in str(caught.value)
    # Older versions took any order and applied them in this one: their runs go on.
    save_config(load_config(CONFIG, good), tmp_path / "config.json")
    record = json.loads((tmp_path / "config.json").read_text())
    record["recipes"] = ["adversarial", "lora", "distill"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "model.json").write_text("{}")
    reading = read_config(str(tmp_path / "config.json"), {})
    assert reading.config.recipes == ("lora", "distill", "adversarial")
    assert any("in the order in which they were applied" in note for note in reading.notes)


def test_a_field_of_another_task_is_told_from_a_wrong_one():
    for name in ("evaluate.warn_after", "evaluate.patience", "data.max_boxes"):
        with pytest.raises(UserError, match=f"unknown config key `{name}`: it is a field of det"):
            load_config(CONFIG, {name: "3"})
