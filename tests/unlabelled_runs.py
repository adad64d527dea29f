"""What the tests of tasks without labels share: small runs, and what is asked of each of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import runs
from PIL import Image
from safetensors.numpy import load_file

from vision_jax import train
from vision_jax.config import load_config
from vision_jax.logging import read_metrics
from vision_jax.main import main
from vision_jax.run.prepare import Run

ENCODER = {"width": 32, "depth": 1, "num_heads": 2, "mlp_width": 64, "patch_size": 4}
RESNET = "(('depths', (1,)), ('widths', (8,)), ('stem_width', 8))"
TINY = {
    "model.image_size": 16,
    "batch_size": 16,
    "total_steps": 6,
    "checkpoint_every": 2,
    "log_every": 1,
    "evaluate.every": 3,
    "evaluate.batch_size": 8,
    "optim.warmup_steps": 1,
    "optim.lr": 0.01,
}


def overrides(own, **more):
    """Fields of a tiny run: `own` ones of a task, by their names, and `more` as runs.overrides."""
    fields = TINY | {
        "data.train": f"cifar10:{runs.inputs()}/train",
        "data.eval": f"cifar10:{runs.inputs()}/test",
    }
    fields |= own | {name.replace("__", "."): value for name, value in more.items()}
    return {name: str(value) for name, value in fields.items()}


def config_of(name, own, **more):
    """configs/NAME.py as a tiny run."""
    return load_config(str(runs.ROOT / f"configs/{name}.py"), overrides(own, **more))


def few_labels(workdir, size, **more):
    """configs/mae_embedded.py:few_labels on the tiny data, from the run in `workdir`."""
    file = str(runs.ROOT / "configs/mae_embedded.py") + ":few_labels"
    fields = {
        "model__weights": workdir, "model__variant": "", "model__arguments": "()",
        "model__image_size": size, "data__subset": 0,
    }  # fmt: skip
    return load_config(file, overrides({}, **(fields | more)))


def check_transfer(workdir, name, out):
    """configs/transfer.py fine-tunes the weights of a run, at the size that they are for."""
    fields = overrides({}, model__weights=workdir)
    del fields["model.image_size"]
    config = load_config(f"{runs.ROOT / 'configs/transfer.py'}:{name}", fields)
    assert train.run(config, out) == 0
    before, after = (json.loads((d / "model.json").read_text()) for d in (workdir, out))
    assert after["family"] == "vit"
    assert after["arguments"]["image_size"] == before["arguments"]["image_size"]
    assert any("eval/top1" in r for r in read_metrics(out / "metrics.jsonl"))
    # Six updates at a rate of 1e-4 leave weights near to where they began.
    began, ended = (load_file(d / "model.safetensors") for d in (workdir, out))
    kernel = "blocks.0.mlp.fc1.weight"
    change = np.linalg.norm(ended[kernel] - began[kernel]) / np.linalg.norm(began[kernel])
    assert 0 < change < 0.1


def finish(config, workdir):
    """Trains; returns how often the step was compiled."""
    made, make = [], Run.make_train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "make_train_step", lambda run: made.append(make(run)) or made[-1])
        assert train.run(config, workdir) == 0
    (step,) = made
    return step._cache_size()


def steps_on(devices, config, count=3):
    """(losses, state) of updates on so many devices, by a step that is compiled once."""
    prepared = runs.Prepared(devices=devices, fsdp=devices, config=config)
    state, losses = prepared.state, []
    for _ in range(count):
        state, metrics = prepared.step(state, prepared.frozen, prepared.batch)
        losses.append(float(metrics["loss"]))
    assert prepared.step._cache_size() == 1
    return losses, state


def write_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """A folder of images of one color each, (width, height) pixels."""
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", size, (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def check_predict(workdir, tmp_path, capsys, picture):
    """What predict says of two files; it writes the picture."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        image = Image.fromarray(rng.integers(0, 255, (20, 24, 3), np.uint8))
        image.save(tmp_path / name)
    flags = [f"--workdir={workdir}", f"--images={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert main(["predict", *flags]) == 0
    assert (tmp_path / "out" / picture).is_file()
    return capsys.readouterr().out


def check_evaluate(workdir, name, capsys, *flags):
    """evaluate finds what the run's last evaluation did; robustness names the way."""
    assert main(["evaluate", f"--workdir={workdir}", *flags]) == 0
    found = float(capsys.readouterr().out.split(f"{name} ")[1].split()[0])
    records = read_metrics(workdir / "metrics.jsonl")
    (logged,) = (r[f"eval/{name}"] for r in records if r.get("step") == 6 and f"eval/{name}" in r)
    assert abs(found - logged) < 2e-4
    assert main(["robustness", f"--workdir={workdir}"]) == 2
    assert "fine-tune it first" in capsys.readouterr().err


def check_adapters(config, workdir):
    """With adapters on qkv of runs.inputs()' weights the rest of the ViT stays."""
    assert train.run(config, workdir) == 0
    assert (workdir / "adapter/adapter_model.safetensors").is_file()
    before = load_file(runs.inputs() / "weights.safetensors")
    after = load_file(workdir / "model.safetensors")
    np.testing.assert_array_equal(after["norm.weight"], before["norm.weight"])
    assert (after["blocks.0.attn.qkv.weight"] != before["blocks.0.attn.qkv.weight"]).any()


def check_refused(name, own, cases, workdir, capsys):
    """Each case of (fields, message) is one line before anything is written."""
    for fields, message in cases:
        flags = [f"--config.{n}={value}" for n, value in overrides(own, **fields).items()]
        config = f"--config={runs.ROOT / f'configs/{name}.py'}"
        assert main([config, f"--workdir={workdir}", *flags]) == 2, message
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
        assert message in line
        assert not workdir.exists()
