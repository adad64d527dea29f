"""The command line: a bad request ends in one line and exit code 2, and leaves no trace."""

import os
import pickle
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
from vision_jax.config import TASKS, fields_of
from vision_jax.data.pipeline import DamageLog  # noqa: F401  (imported before the clock starts)


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
        ([], "--config is missing"),
        (["--config=absent.py"], "there is no file absent.py"),
        (["--confg=x"], "unknown argument '--confg=x'"),
        ([CONFIG, "--config.optim.lr"], "--config.optim.lr has no value"),
        ([CONFIG, "--config.lora.dora", "--workdir=x"], "--config.lora.dora has no value"),
        ([CONFIG, "extra"], "unknown argument 'extra'"),
        ([CONFIG, "--mode=test"], "invalid choice: 'test'"),
        ([CONFIG, "--processes=two"], "--processes: invalid int value"),
        (["--mode=evaluate"], "needs --workdir"),
        (["--mode=evaluate", "--workdir=absent"], "absent holds no run"),
        (["--mode=predict", "--workdir=absent", "--images=a.png"], "absent holds no run"),
        ([CONFIG, "--images=a.png"], "--images is a flag of predict, and this is train"),
        ([CONFIG, "--out=x"], "--out is a flag of predict, and this is train"),
        ([CONFIG, "--checkpoint=last"], "--checkpoint is a flag of evaluate, predict, robustness"),
        ([CONFIG, "--devices=4"], "--devices is a flag of plan, and this is train"),
        ([CONFIG, "--memory=3"], "--memory is a flag of plan, and this is train"),
        ([CONFIG, "--mode=teach", "--workdir=x"], "--workdir is a flag of train, frozen, "),
        ([CONFIG, "--mode=frozen", "--checkpoint=best"], "--checkpoint is a flag of"),
        ([CONFIG, "--mode=evaluate"], "--config is a flag of train, frozen, teach, plan, and"),
        (["--mode=evaluate", "--workdir=absent", "--images=a"], "--images is a flag of predict"),
        ([CONFIG, "--plan", "--workdir=x"], "--workdir is a flag of"),
        ([CONFIG, "--plan", "--mode=evaluate"], "leave it or --mode=evaluate out"),
        ([CONFIG, "--process=0"], "--processes and --process go together"),
        ([CONFIG, "--coordinator=auto", "--process=0"], "leave them out"),
        ([CONFIG, "--work_dir=x"], "did you mean `--workdir`?"),
        ([CONFIG, "--output_dir=x"], "results go to the folder of the flag --workdir=DIR"),
        (["configs/vit_lora.py"], "did you mean `--config=configs/vit_lora.py`?"),
        (["evaluate", "--workdir=x"], "did you mean `--mode=evaluate`?"),
        ([CONFIG, "optim.lr=1e-3"], "did you mean `--config.optim.lr=1e-3`?"),
        ([CONFIG, "--plan", "--devices=0"], "--devices is 0: it must be at least 1"),
        ([CONFIG, "--plan", "--memory=nan"], "--memory is nan: it must be a size above 0"),
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


def test_a_disk_that_is_full_from_the_start_is_one_line(tmp_path, capsys, monkeypatch):
    def refuse(*arguments, **keywords):
        raise OSError(28, "No space left on device", str(tmp_path / "run/model.json"))

    monkeypatch.setattr(train.setup, "save_description", refuse)
    assert command(tmp_path / "run") == 2
    assert "No space left on device" in refusal(capsys)
    monkeypatch.undo()
    # What is there now is no run: any config may start in its place.
    monkeypatch.setattr(train, "open_log", refuse)
    assert command(tmp_path / "run", optim__lr=0.5) == 2
    assert (tmp_path / "run" / "config.json").is_file()


def test_every_flag_of_another_mode_has_its_line(capsys):
    assert main.main([CONFIG, "--images", "a", "--memory=3", "--out=x"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["--images", "--out", "--memory"]


def test_every_flag_is_of_modes_that_exist():
    for modes, _ in main.FLAGS.values():
        assert modes
        assert set(modes) <= set(main.MODES)


def test_ctrl_c_before_the_loop_is_one_line(tmp_path, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupt)
    assert command(tmp_path / "run") == 128 + 2
    assert capsys.readouterr().err == "stopped; run the same command again to resume\n"


def test_flags_reach_the_modes(tmp_path, monkeypatch):
    run, seen = f"--workdir={runs.finished()}", []
    monkeypatch.setattr(train, "run", lambda *given: seen.append(given) or 0)
    monkeypatch.setattr("vision_jax.modes.predict", lambda *given: seen.append(given) or 0)
    monkeypatch.setattr("vision_jax.modes.evaluate", lambda *given: seen.append(given) or 0)
    assert main.main([CONFIG, "--config.optim.lr=0.25"]) == 0
    config, workdir, start_from = seen[-1]
    assert (config.optim.lr, str(workdir), start_from) == (0.25, "runs/vit_lora", None)
    assert main.main([CONFIG, "--from=a/run"]) == 0
    assert seen[-1][2] == Path("a/run")
    assert main.main([CONFIG, "--config.optim.lr", "0.5", "--config.mesh.data", "-1"]) == 0
    assert (seen[-1][0].optim.lr, seen[-1][0].mesh.data) == (0.5, -1)

    assert main.main([run, "--mode=predict", "--images=a", "b", "--images", "c", "--out=o"]) == 0
    config, workdir, checkpoint, images, out = seen[-1]
    assert config.optim.ema_decay == 0.5  # the run's own
    assert (workdir, checkpoint, str(out)) == (runs.finished(), "last", "o")
    assert sorted(images) == ["a", "b", "c"]

    more = ["--checkpoint=best", "--config.evaluate.batch_size=7"]
    assert main.main([run, "--mode=evaluate", *more]) == 0
    config, _, checkpoint = seen[-1]
    assert (config.evaluate.batch_size, checkpoint) == (7, "best")


def test_fields_of_training_are_refused_of_a_finished_run(capsys):
    for mode in ("evaluate", "predict", "robustness"):
        given = [
            "--config.model.image_size=32",
            "--config.optim.lr=1",
            "--config.trainable=head/.*",
        ]
        images = ["--images=a.png"] if mode == "predict" else []
        assert main.main([f"--mode={mode}", f"--workdir={runs.finished()}", *images, *given]) == 2
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


def test_help_shows_modes_and_overrides(capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in (
        "train,evaluate,predict",
        "--checkpoint",
        "of predict: files",
        "--config.FIELD=VALUE",
        "resumes",
        "--images",
    ):
        assert part in text
    assert jax.device_count() == 8


def outside(folder, *arguments):
    """`python -m ...` in another folder than the repository's, with the package installed."""
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(runs.ROOT)},
        capture_output=True,
        text=True,
    )


def test_the_package_says_what_commands_there_are(tmp_path):
    shown = outside(tmp_path, "vision_jax", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    for name in ("main", "config", "doctor", "convert", "certify"):
        assert f"python -m vision_jax.{name} " in shown.stdout
    assert all(f"  {mode} " in shown.stdout for mode in main.MODES)


def test_commands_and_modes_run_from_any_folder(tmp_path):
    for command, message in (
        (["vision_jax", "docter"], "did you mean `doctor`?"),
        (["vision_jax", "xyz"], "--help lists them"),
        (["vision_jax", "evaluate", "--workdir=absent"], "absent holds no run"),
        (["vision_jax", "config", "absent.py"], "there is no file absent.py"),
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
