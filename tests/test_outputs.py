"""Where commands may write: not over a run, nor over what they read, nor where a file stands."""

import importlib

import pytest
import runs

from vision_jax import main
from vision_jax.commands.source import check_keeps
from vision_jax.config import save_config
from vision_jax.errors import UserError

EMBEDDED = "embedded:vit_cifar10"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What marks a run, with contents that would be missed."""
    folder = tmp_path_factory.mktemp("outputs") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    save_config(runs.tiny_config(), folder / "config.json")
    (folder / "model.json").write_text("{}")
    (folder / "model.safetensors").write_text("dear")
    return folder


COMMANDS = {
    "export": lambda run, out: ["export", EMBEDDED, "--to=safetensors", f"--out={out}"],
    "export itself": lambda run, out: ["export", run, "--to=safetensors", f"--out={out}"],
    "prune": lambda run, out: ["prune", EMBEDDED, "--keep=0.5", f"--to={out}"],
    "prune itself": lambda run, out: ["prune", run, "--keep=0.5", f"--to={out}"],
    "factorize": lambda run, out: ["factorize", EMBEDDED, "--keep=0.5", f"--to={out}"],
    "quantize": lambda run, out: ["quantize", f"--workdir={run}", f"--out={out}"],
}


def call(arguments):
    """In this process, where the modules of commands may be there already."""
    name, *others = map(str, arguments)
    if name == "quantize":
        return main.main([name, *others])
    return importlib.import_module(f"vision_jax.commands.{name}").main(others)


def files_of(folder):
    return {path.name: path.is_file() and path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", COMMANDS)
def test_runs_are_not_written_over(name, run_folder, capsys):
    before = files_of(run_folder)
    assert call(COMMANDS[name](run_folder, run_folder)) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert f"{run_folder} is a run's folder, whose model it would replace" in shown
    assert files_of(run_folder) == before


@pytest.mark.parametrize(
    "name", ["export", "export onnx", "prune", "factorize", "quantize", "explain"]
)
def test_a_file_is_no_folder(name, run_folder, tmp_path, capsys):
    others = {
        "export onnx": lambda run, out: ["export", EMBEDDED, "--to=onnx", f"--out={out}"],
        "explain": lambda run, out: ["explain", EMBEDDED, "--images", run, f"--out={out}"],
    }
    (tmp_path / "file").write_text("dear")
    for out in (tmp_path / "file", tmp_path / "file/below"):
        assert call((COMMANDS | others)[name](run_folder, out)) == 2
        shown = capsys.readouterr().err
        assert shown.count("\n") == 1
        assert f"{tmp_path / 'file'} is a file: name a folder" in shown


def test_a_seed_is_no_negative_number(capsys):
    assert call(["explain", EMBEDDED, "--images", "none.png", "--seed=-1"]) == 2
    assert "--seed: '-1' is no whole number from 0" in capsys.readouterr().err


def test_what_is_read_is_not_written_over(tmp_path):
    model = tmp_path / "models/model.safetensors"
    model.parent.mkdir()
    model.write_text("dear")
    for source in (model, model.parent, tmp_path / "models/../models"):
        with pytest.raises(UserError, match=r"--to: .*models holds .*, which it would replace"):
            check_keeps("--to", model.parent, source)
    check_keeps("--to", tmp_path / "models/export", model)
    check_keeps("--to", model.parent, tmp_path / "elsewhere")
