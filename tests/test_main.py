"""The command line: a bad request ends in one line and exit code 2, and leaves no trace."""

import contextlib
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import save_file

from vision_jax import main, train
from vision_jax.commands import models
from vision_jax.config import TASKS, fields_of
from vision_jax.convert.tables import ZOO
from vision_jax.data.pipeline import DamageLog  # noqa: F401  (imported before the clock starts)
from vision_jax.models.families import build_model, find_variant, initialize


@pytest.fixture(scope="module", autouse=True)
def finished():
    """The shared run, made before any test of this file replaces a part of the program."""
    return runs.finished()


CONFIG = f"--config={runs.ROOT / 'configs/vit_lora.py'}"


def command(workdir, *more, **fields):
    overrides = [f"--config.{name}={value}" for name, value in runs.overrides(**fields).items()]
    return main.main([CONFIG, f"--workdir={workdir}", *overrides, *more])


def refusal(capsys) -> str:
    """The one line on the screen."""
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def make_inputs(folder):
    """Files that are wrong in all the ways that users have found."""
    whole = (runs.inputs() / "weights.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    (folder / "header.safetensors").write_bytes(whole[:5])
    (folder / "empty.safetensors").write_bytes(b"")
    resnet = {
        "conv1.weight": np.zeros((64, 3, 7, 7), np.float32),
        "bn1.running_mean": np.zeros(64, np.float32),
        "layer1.0.conv1.weight": np.zeros((64, 64, 1, 1), np.float32),
        "fc.weight": np.zeros((1000, 2048), np.float32),
    }
    save_file(resnet, folder / "resnet.safetensors")
    (folder / "list.pth").write_bytes(pickle.dumps([1, 2, 3]))
    (folder / "empty").mkdir()
    (folder / "no_images" / "ant").mkdir(parents=True)
    (folder / "image.png").write_bytes(b"")
    (folder / "range.csv").write_text("path,label\nimage.png,0\nimage.png,-1\n")
    (folder / "eval.csv").write_text("path,label\nimage.png,4\n")
    (folder / "file").write_text("")


BAD = {
    "weights missing": ({"model__weights": "{0}/absent.safetensors"}, "no such file or folder"),
    "weights truncated": ({"model__weights": "{0}/truncated.safetensors"}, "damaged or no safeten"),
    "weights cut": ({"model__weights": "{0}/header.safetensors"}, "damaged or no safetensors"),
    "weights empty": ({"model__weights": "{0}/empty.safetensors"}, "damaged or no safetensors"),
    "resnet": ({"model__weights": "{0}/resnet.safetensors"}, "resnet.safetensors"),
    "pickle": ({"model__weights": "{0}/list.pth"}, "--config.model.allow_pickle=True"),
    "pickle allowed": (
        {"model__weights": "{0}/list.pth", "model__allow_pickle": True},
        "list.pth",
    ),
    "weights embedded": ({"model__weights": "embedded:none"}, "no such weights"),
    "no architecture": ({"model__weights": ""}, "set config.model.variant"),
    "variant": ({"model__variant": "xxl/16"}, "xxl/16"),
    "argument": ({"model__arguments": "(('widht', 8),)"}, "did you mean `width`?"),
    "argument value": ({"model__arguments": "(('num_heads', 5),)"}, "there is no such model"),
    "key": ({"optim__learning_rate": 1}, "unknown config key `optim.learning_rate`"),
    "type": ({"total_steps": "many"}, "`total_steps` takes int"),
    "rule lora": ({"lora__rules": "blocks_.*"}, "lora.rules: rule 'blocks_.*' matches no"),
    "rule trainable": ({"trainable": "heads/.*"}, "config.trainable: rule 'heads/.*' matches no"),
    "rule reinitialize": (
        {"model__reinitialize": "('head/.*', 'heads/.*')"},
        "config.model.reinitialize: rule 'heads/.*' matches no",
    ),
    "rule regex": ({"trainable": "(head"}, "must be a tuple of regular expressions"),
    "rule drop": ({"model__drop": "pooler.*"}, "pooler"),
    "nothing trains": ({"recipes": "()", "trainable": "()"}, "nothing trains"),
    "head": ({"model__reinitialize": "()"}, "head of 3 classes and config.data.train has 4"),
    "adapter": ({"lora__rules": "()", "lora__init_from": "{0}/empty"}, "no adapter_config.json"),
    "adapter and rules": ({"lora__init_from": "{0}/empty"}, "set config.lora.rules=()"),
    "rank": ({"lora__rank": 0}, "lora.rank"),
    "optimizer": ({"optim__name": "adam"}, "config.optim.name is 'adam': it must be adamw, "),
    "schedule": (
        {"optim__schedule": "stairs"},
        "config.optim.schedule is 'stairs': it must be cosine",
    ),
    "warm-up": ({"optim__warmup_steps": 99}, "warmup_steps"),
    "data missing": ({"data__train": "{0}/absent"}, "no such folder or file"),
    "folder empty": ({"data__train": "{0}/empty"}, "no class folders"),
    "class folder empty": ({"data__train": "{0}/no_images"}, "no image in this class folder"),
    "label": ({"data__train": "{0}/range.csv"}, "range.csv:3: label -1 is out of range"),
    "label of eval": ({"data__eval": "{0}/eval.csv"}, "label 4 is out of range"),
    "crop": ({"data__crop": "middle"}, "crop is 'middle'"),
    "interpolation": ({"data__interpolation": "cubic"}, "interpolation"),
    "holdout": ({"data__eval": "", "data__holdout": 2.0}, "holdout"),
    "batch": ({"batch_size": 12}, "batch_size 12 does not divide among 8 devices"),
    "micro-batch": ({"optim__accumulate": 3}, "accumulate 3"),
    "mesh": ({"mesh__fsdp": 3}, "does not fit 8 devices"),
    "sharding": ({"sharding_rules": "(('head/kernel', ('model',)),)"}, "cannot be split"),
    "dtype": ({"model__dtype": "float16"}, "config.model.dtype"),
    "policy": ({"augment__policy": "auto"}, "none, rand or trivial"),
    "steps": ({"total_steps": 0}, "config.total_steps is 0: it must be at least 1"),
    "image size": ({"model__image_size": 4}, "image_size"),
    "image size cut": ({"model__image_size": 20}, "take a multiple of 8, such as 16 or 24"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_leaves_no_trace(name, tmp_path, capsys):
    make_inputs(tmp_path)
    fields, message = BAD[name]
    fields = {field: str(value).format(tmp_path) for field, value in fields.items()}
    assert command(tmp_path / "run", **fields) == 2
    assert message in refusal(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "--config is missing"),
        (["--workdir=absent"], "--config is missing"),
        (["--config=absent.py"], "there is no file absent.py"),
        (["--confg=x"], "unknown argument '--confg=x'"),
        ([CONFIG, "--config.optim.lr"], "--config.optim.lr has no value"),
        ([CONFIG, "--config.lora.dora", "--workdir=x"], "--config.lora.dora has no value"),
        ([CONFIG, "extra"], "unknown argument 'extra'"),
        ([CONFIG, "--mode=tran"], "there is no command 'tran': did you mean `train`?"),
        (["evalaute", "--workdir=x"], "no command 'evalaute': did you mean `evaluate`?"),
        (["frozen", CONFIG], "frozen is called probe now: `vision_jax probe`"),
        (["--mode=teach", CONFIG], "teach is called cache-teacher now: `vision_jax cache-teacher`"),
        ([CONFIG, "plan"], "a command comes first, `vision_jax plan ...`"),
        ([CONFIG, "--processes=two"], "--processes: invalid int value"),
        (["evaluate"], "evaluate needs --workdir"),
        (["evaluate", "--workdir=absent"], "absent holds no run"),
        (["--mode=evaluate", "--workdir=absent"], "absent holds no run"),
        (["predict", "--workdir=absent", "--images=a.png"], "absent holds no run"),
        (["--show", "--workdir=absent"], "absent holds no run"),
        ([CONFIG, "--images=a.png"], "--images is a flag of predict, and this is train"),
        ([CONFIG, "--out=x"], "--out is a flag of predict, quantize, and this is train"),
        ([CONFIG, "--checkpoint=last"], "--checkpoint is a flag of evaluate, predict, robustness"),
        ([CONFIG, "--devices=4"], "--devices is a flag of plan, and this is train"),
        ([CONFIG, "--memory=3"], "--memory is a flag of plan, and this is train"),
        (["cache-teacher", CONFIG, "--workdir=x"], "--workdir is a flag of train, probe, "),
        (["probe", CONFIG, "--checkpoint=best"], "--checkpoint is a flag of"),
        (
            ["evaluate", CONFIG],
            "--config is a flag of train, probe, cache-teacher, plan, search, find-lr, ",
        ),
        (["evaluate", "--workdir=absent", "--images=a"], "--images is a flag of predict"),
        (["plan", CONFIG, "--workdir=x"], "--workdir is a flag of"),
        ([CONFIG, "--plan", "--workdir=x"], "--workdir is a flag of"),
        (
            ["models", CONFIG],
            "cache-teacher, plan, search, find-lr, compress, and this is models",
        ),
        (
            ["models", "--config.seed=1"],
            "--config.seed is a field of a config, and models takes no",
        ),
        (["models", "resnet5O"], "there is no model 'resnet5O': did you mean `timm/resnet50`?"),
        (["--help-config", "optm"], "no field or section `optm`: did you mean `optim`?"),
        ([CONFIG, "--process=0"], "--processes and --process go together"),
        ([CONFIG, "--coordinator=auto", "--process=0"], "leave them out"),
        ([CONFIG, "--work_dir=x"], "did you mean `--workdir`?"),
        ([CONFIG, "--output_dir=x"], "results go to the folder of the flag --workdir=DIR"),
        (["configs/vit_lora.py"], "did you mean `--config=configs/vit_lora.py`?"),
        ([CONFIG, "optim.lr=1e-3"], "did you mean `--config.optim.lr=1e-3`?"),
        (["plan", CONFIG, "--devices=0"], "--devices is 0: it must be at least 1"),
        (["plan", CONFIG, "--memory=nan"], "--memory is nan: it must be a size above 0"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert main.main(arguments) == 2
    assert message in refusal(capsys)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_workdir_that_cannot_be_written_is_one_line(name, tmp_path, capsys):
    make_inputs(tmp_path)
    assert command(tmp_path / name) == 2
    assert str(tmp_path / name) in refusal(capsys)


@pytest.mark.long
def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError(28, "No space left on device", str(tmp_path / "run/model.json"))

    monkeypatch.setattr(train.workdirs, "save_description", refuse)
    assert command(tmp_path / "run") == 2
    assert "No space left on device" in refusal(capsys)
    monkeypatch.undo()
    # What is there now is no run: any config may start in its place.
    monkeypatch.setattr(train, "open_log", refuse)
    assert command(tmp_path / "run", optim__lr=0.5) == 2
    assert (tmp_path / "run" / "config.json").is_file()


def test_every_flag_of_another_command_has_its_line(capsys):
    assert main.main([CONFIG, "--images", "a", "--memory=3", "--out=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--images", "--out", "--memory"]


def test_every_flag_is_of_commands_that_exist():
    for name, command in main.COMMANDS.items():
        module, _, function = command.run.partition(":")
        found = importlib.import_module(module)
        assert not function or callable(getattr(found, function))
        if not function:
            assert not command.takes
        assert all(name in main.FLAGS[taken][0] for taken in command.takes if taken != "config")
    for commands, _ in main.FLAGS.values():
        assert commands
        assert set(commands) <= set(main.COMMANDS)


def test_ctrl_c_before_the_loop_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupt)
    assert command(tmp_path / "run") == 128 + 2
    assert capsys.readouterr().err == "stopped; run the same command again to resume\n"


def test_flags_reach_the_commands(tmp_path, monkeypatch):
    run, seen = f"--workdir={runs.finished()}", []
    monkeypatch.setattr(train, "run", lambda *given: seen.append(given) or 0)
    monkeypatch.setattr("vision_jax.commands.predict.run", lambda *given: seen.append(given) or 0)
    monkeypatch.setattr("vision_jax.commands.evaluate.run", lambda *given: seen.append(given) or 0)
    assert main.main([CONFIG, "--config.optim.lr=0.25"]) == 0
    config, workdir, start_from = seen[-1]
    assert (config.optim.lr, str(workdir), start_from) == (0.25, "runs/vit_lora", None)
    assert main.main([CONFIG, "--from=a/run"]) == 0
    assert seen[-1][2] == Path("a/run")
    assert main.main([CONFIG, "--config.optim.lr", "0.5", "--config.mesh.data", "-1"]) == 0
    assert (seen[-1][0].optim.lr, seen[-1][0].mesh.data) == (0.5, -1)

    assert main.main(["predict", run, "--images=a", "b", "--images", "c", "--out=o"]) == 0
    config, workdir, checkpoint, images, out, weights = seen[-1]
    assert config.optim.ema_decay == 0.5  # the run's own
    assert (workdir, checkpoint, str(out), weights) == (runs.finished(), "last", "o", None)
    assert sorted(images) == ["a", "b", "c"]

    given = ["predict", "--weights=w.json", "--images=a"]
    assert main.main([*given, "--config.evaluate.score=0.3"]) == 0
    fields, workdir, _, images, out, weights = seen[-1]
    assert (fields, workdir, images, out) == ({"evaluate.score": "0.3"}, None, ["a"], None)
    assert weights == "w.json"
    assert main.main([*given, run]) == 2

    more = ["--checkpoint=best", "--config.evaluate.batch_size=7"]
    for spelled in (["evaluate", run], [run, "--mode=evaluate"], ["--mode", "evaluate", run]):
        seen.clear()
        assert main.main([*spelled, *more]) == 0
        config, _, checkpoint = seen[-1]
        assert (config.evaluate.batch_size, checkpoint) == (7, "best")
    monkeypatch.setattr("vision_jax.commands.plan.run", lambda *given: seen.append(given) or 0)
    for spelled in (["plan", CONFIG], [CONFIG, "--plan"], ["--mode=plan", CONFIG]):
        seen.clear()
        assert main.main([*spelled, "--memory=4"]) == 0
        assert seen[-1][1] == 4


def test_fields_of_training_are_refused_of_a_finished_run(capsys):
    for name in ("evaluate", "predict", "robustness"):
        given = [
            "--config.model.image_size=32",
            "--config.optim.lr=1",
            "--config.trainable=head/.*",
        ]
        images = ["--images=a.png"] if name == "predict" else []
        assert main.main([name, f"--workdir={runs.finished()}", *images, *given]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.split()[1] for line in lines] == [text.partition("=")[0] for text in given]
    names = {name for task in TASKS for name in fields_of(task)}
    kept = {name for name in names if main.KEPT.fullmatch(name)}
    assert {"model.variant", "data.crop_pct", "batch_size", "loss.class_cost"} <= kept
    used = (
        "data.train",
        "data.eval",
        "data.images",
        "data.holdout",
        "data.threads",
        "data.workers",
    )
    assert not kept & {*used, "seed", "mesh.data", "model.dtype", "evaluate.batch_size"}
    assert not any(name.startswith("robustness.") for name in kept)


def test_a_home_is_found_behind_an_equals_sign(tmp_path, monkeypatch):
    """Shells replace no ~ there, and a folder of that name is nobody's wish."""
    seen = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(train, "run", lambda *given: seen.append(given) or 0)
    shutil.copy(runs.ROOT / "configs/vit_lora.py", tmp_path / "mine.py")
    assert main.main(["--config=~/mine.py", "--workdir=~/run"]) == 0
    assert seen[-1][1] == tmp_path / "run"


def shown(capsys, *arguments):
    """What a command that only prints has on the screen."""
    with contextlib.suppress(SystemExit):  # argparse's, after its help
        assert main.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_overview_names_all_commands(capsys):
    text = shown(capsys)
    assert text == shown(capsys, "--help") == shown(capsys, "help")
    for name, about in main.COMMANDS.items():
        assert f"    {name:13}  {about.help}\n" in text
    for part in ("--config.FIELD=VALUE", "resumes", "--images", "train is the default"):
        assert part in text


@pytest.mark.parametrize("name", [n for n, one in main.COMMANDS.items() if ":" in one.run])
def test_the_help_of_a_command_has_its_flags_alone(name, capsys):
    text = shown(capsys, name, "--help")
    assert text.startswith(f"usage: vision_jax {name} ")
    for flag, (commands, _) in main.FLAGS.items():
        spelled = flag if flag.isupper() else f"--{flag}"
        assert bool(re.search(rf"^  {spelled}\b", text, re.M)) == (name in commands), flag
    assert ("--config.FIELD=VALUE" in text) == (name in main.CONFIGURED)


def test_the_fields_of_a_file_and_of_a_finished_run_are_shown(capsys, monkeypatch):
    monkeypatch.setattr(train, "run", lambda *given: pytest.fail("only shown"))
    text = shown(capsys, CONFIG, "--config.seed=3", "--show")
    assert re.search(r"^seed = 3 +command line +# of init", text, re.M)
    assert re.search(r"^lora.rank = 8 +default +# ", text, re.M)
    for command in ([], ["evaluate"]):
        text = shown(capsys, *command, f"--workdir={runs.finished()}", "--show")
        assert re.search(r"^optim.ema_decay = 0.5 +run's config.json +# ", text, re.M)
    assert shown(capsys, "evaluate", "--help-config", "seed").startswith("seed\n  help     of init")


def test_models_are_listed_by_patterns(capsys):
    everything = shown(capsys, "models").splitlines()
    assert len(everything) == 1 + 3 + len(ZOO)
    heading, *swins = shown(capsys, "models", "swin_*patch4*").splitlines()
    assert heading.split() == ["name", "family", "parameters", "pixels", "config.model.weights"]
    assert all(line.startswith("timm/swin_") for line in swins)
    assert shown(capsys, "models", "TIMM/SWIN_*patch4*").splitlines() == [heading, *swins]
    _, *own = shown(capsys, "models", "embedded").splitlines()
    assert [" ".join(line.split()) for line in own] == [
        "embedded:fashion_generator dit 0.75 M 28 embedded:fashion_generator",
        "embedded:nanodet_coco nanodet 3.79 M 416 embedded:nanodet_coco",
        "embedded:vit_cifar10 vit 0.81 M 32 embedded:vit_cifar10",
    ]
    both = shown(capsys, "models", "swin_*patch4*", "embedded").splitlines()
    assert [" ".join(line.split()) for line in both] == [
        " ".join(line.split()) for line in (heading, *own, *swins)
    ]
    assert main.main(["models", "embedded", "resnet5O"]) == 2
    assert "no model 'resnet5O': did you mean" in capsys.readouterr().err
    lines = shown(capsys, "models", "timm/resnet50").splitlines()
    assert "timm/resnet50  resnet  25.56 M  224  timm://resnet50" in [
        re.sub("  +", "  ", line) for line in lines
    ]


@pytest.mark.long
def test_the_list_of_models_has_the_counts_of_the_certificates():
    counts = {model.name: model for model in models.all_models()}
    certificates = sorted((runs.ROOT / "docs/certificates").rglob("*.json"))
    assert certificates
    for path in certificates:
        record = json.loads(path.read_text())
        listed = counts[record["name"]]
        assert (listed.parameters, listed.image_size, listed.family) == (
            record["parameters"],
            record["image_size"],
            record["family"],
        )
    family, arguments = find_variant("convnext_tiny")  # has no certificate
    model = build_model(family, **arguments, num_classes=1000)
    abstract = jax.eval_shape(lambda key: initialize(model, key, (224, 224)), jax.random.key(0))
    size = sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))
    assert counts["timm/convnext_tiny"].parameters == size


def test_configs_are_listed_with_task_and_first_line(capsys):
    lines = shown(capsys, "configs").splitlines()
    assert [line.split()[0] for line in lines] == [
        f"configs/{path.name}" for path in sorted((runs.ROOT / "configs").glob("*.py"))
    ]
    (own,) = (line for line in lines if line.startswith("configs/detr_tiny.py"))
    assert re.search(r" detection +A small DETR from random initialization", own)


def outside(folder, *arguments):
    """`python -m ...` in another folder than the repository's, with the package installed."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_programs_with_flags_of_their_own_are_commands_too(tmp_path):
    for name in ("convert", "doctor"):
        helped = outside(tmp_path, "vision_jax", name, "--help")
        assert (helped.returncode, helped.stderr) == (0, "")
        assert helped.stdout == outside(tmp_path, f"vision_jax.{name}", "--help").stdout
        assert f"python -m vision_jax.{name}" in helped.stdout


@pytest.mark.long
def test_commands_run_from_any_folder(tmp_path):
    for command, message in (
        (["vision_jax", "docter"], "did you mean `doctor`?"),
        (["vision_jax", "xyz"], "--help lists them"),
        (["vision_jax", "evaluate", "--workdir=absent"], "absent holds no run"),
        (["vision_jax", "--config=absent.py"], "there is no file absent.py"),
        (["vision_jax", "convert", "absent.safetensors", "--dry-run"], "absent.safetensors"),
        (
            ["vision_jax.main", "--config=configs/vit_lora.py", "--config.no_such=1"],
            "unknown config key `no_such`",
        ),
    ):
        refused = outside(tmp_path, *command)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1
        assert message in refused.stderr


def test_nothing_says_the_older_words_of_the_command_line():
    older = re.compile(r"--mode=|vision_jax\.main --plan|`--plan`|frozen\.json")
    files = [runs.ROOT / "README.md"]
    for folder, kind in (("vision_jax", "py"), ("configs", "py"), ("benchmarks", "py")):
        files += (runs.ROOT / folder).rglob(f"*.{kind}")
    files += [*(runs.ROOT / "docs").glob("*.md"), *(runs.ROOT / "colabs").glob("*.ipynb")]
    allowed = {runs.ROOT / "vision_jax/main.py"}  # which understands them
    assert {path for path in files if older.search(path.read_text())} <= allowed
