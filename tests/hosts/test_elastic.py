"""A run that moves between meshes and numbers of processes is the run that never moved.

LoRA, the moving average, PGD in training, a teacher and dropout are on. tests/hosts/elastic.py is
the program.
"""

import json

import numpy as np
import pytest
import runs
from clusters import Cluster, flags, free_port

from vision_jax.logging import read_metrics

pytestmark = pytest.mark.long

STEPS = 10
PROGRAM = runs.ROOT / "tests/hosts/elastic.py"


@pytest.fixture(scope="module")
def fields():
    return runs.overrides(
        batch_size=24,
        total_steps=STEPS,
        checkpoint_every=100,
        evaluate__every=5,
        recipes='("lora", "distill", "adversarial")',
        adversarial__steps=2,
        distill__teachers=f"('{runs.teacher()}',)",
        optim__ema_decay=0.5,
        lora__dropout=0.1,
        hosts__compare_every=3,
    )


def run(workdir, fields, stop, kind, processes=1, devices=1, mesh=()):
    """One leg; the rows that each step took, in the order of the global batch."""
    rows = workdir.parent / f"{workdir.name}_rows"
    rows.mkdir(exist_ok=True)
    port = free_port()
    commands = [
        [
            *(PROGRAM, stop, rows, kind, f"--config={runs.ROOT / 'configs/vit_lora_pgd.py'}"),
            f"--workdir={workdir}",
            *(f"--config.{name}={value}" for name, value in {**fields, **dict(mesh)}.items()),
            *(flags(process, processes, port) if processes > 1 else ()),
        ]
        for process in range(processes)
    ]
    with Cluster(commands, devices=devices) as cluster:
        codes = cluster.wait(400)
        assert codes == [143 if stop else 0] * processes, cluster.screens()
        return cluster.screen(0)[0]


def rows_of(workdir):
    """[STEPS, B]: each process's part after the other's."""
    folder = workdir.parent / f"{workdir.name}_rows"
    found = []
    for step in range(STEPS):
        parts = sorted(folder.glob(f"{step}.*.npy"))
        found.append(np.concatenate([np.load(part) for part in parts]))
    return found


def losses(workdir):
    names = ("train/loss", "train/grad_norm", "eval/loss")
    return {
        (record["step"], name): record[name]
        for record in read_metrics(workdir / "metrics.jsonl")
        for name in names
        if name in record
    }


# (after which step it is stopped, at least two later than it began, processes, devices of each,
# mesh)
DEVICES = (
    (2, 1, 8, {"mesh.data": -1}),
    (4, 1, 4, {"mesh.data": 2, "mesh.fsdp": 2}),
    (6, 1, 2, {"mesh.fsdp": 2}),
    (8, 1, 1, {}),
    (0, 1, 8, {"mesh.data": 1, "mesh.fsdp": 8}),
)
PROCESSES = (
    (2, 4, 1, {}),
    (5, 2, 2, {"mesh.fsdp": 2}),
    (7, 1, 1, {}),
    (0, 3, 1, {}),
)


@pytest.fixture(scope="module", params=["float64", "float32"])
def whole(request, tmp_path_factory, fields):
    workdir = tmp_path_factory.mktemp(request.param) / "whole"
    run(workdir, fields, 0, request.param)
    return workdir


@pytest.mark.parametrize("legs", [DEVICES, PROCESSES], ids=["devices", "processes"])
def test_a_run_that_moves_is_the_run_that_never_moved(legs, fields, whole, tmp_path, rng):
    kind = whole.parent.name[:7]
    workdir, before = tmp_path / "moved", 0
    for stop, processes, devices, mesh in legs:
        screen = run(workdir, fields, stop, kind, processes, devices, mesh.items())
        assert not before or f"resumed at step {before}" in screen
        before = stop
    ours, theirs = rows_of(workdir), rows_of(whole)
    np.testing.assert_array_equal(ours, theirs)
    ours, theirs = losses(workdir), losses(whole)
    assert ours.keys() == theirs.keys()
    worst = max(abs(ours[key] / theirs[key] - 1) for key in theirs)
    print(json.dumps({"legs": len(legs), "kind": kind, "largest relative difference": worst}))
    assert worst < 1e-6
