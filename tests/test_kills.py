"""Training of each task, killed at random moments: bits, files and processes that are left.

tests/kills.py is the program; hours with all of them, so one task is chosen with -k.
"""

import json
import sys
from pathlib import Path

import detection_runs
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
import segmentation_runs
import test_contrastive
import test_generation_runs
import test_image_text
import test_pretraining
import test_self_distillation
import unlabelled_runs
from safetensors.numpy import load_file

from vision_jax.checkpoints import complete_steps
from vision_jax.logging import read_metrics

pytestmark = [
    pytest.mark.long,
    pytest.mark.hours,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

TAUGHT = {"recipes": '("lora", "distill", "adversarial")', "adversarial__steps": 2}
UNLABELLED = {"optim__ema_decay": 0.5, "optim__accumulate": 2}
# The task: (its config, fields of a tiny run)
TASKS = {
    "classification": ("vit_lora", lambda: runs.overrides(**runs.FULL)),
    "a taught and attacked one": (
        "vit_lora_pgd",
        lambda: runs.overrides(**(runs.FULL | TAUGHT), distill__teachers=f"('{runs.teacher()}',)"),
    ),
    "detection": ("detr_finetune", lambda: detection_runs.overrides(optim__ema_decay=0.5)),
    "segmentation": ("segment_nuclei", segmentation_runs.overrides),
    "pretraining": (
        "mae_embedded",
        lambda: unlabelled_runs.overrides(test_pretraining.TINY, **UNLABELLED),
    ),
    "self-distillation": (
        "dino_embedded",
        lambda: unlabelled_runs.overrides(test_self_distillation.TINY),
    ),
    "contrastive": (
        "simclr_embedded",
        lambda: unlabelled_runs.overrides(test_contrastive.TINY, optim__accumulate=2),
    ),
    "image-text": ("siglip_embedded", test_image_text.overrides),
    "generation": (
        "generate_embedded",
        lambda: {
            **test_generation_runs.SHORT,
            "model.arguments": repr(tuple(test_generation_runs.SIZES.items())),
            "total_steps": "6",
            "checkpoint_every": "2",
        },
    ),
}
KILLS = {1: 7, 2: 5}  # of each task, by the number of processes: 108 in all


def names(workdir):
    """Of all files, but those that a process numbers or a time names."""
    return sorted(
        str(path.relative_to(workdir))
        for path in workdir.rglob("*")
        if path.relative_to(workdir).parts[0] not in ("checkpoints", "frozen", "tensorboard")
    )


def records(workdir):
    """What was logged, without how long it took."""
    found = read_metrics(workdir / "metrics.jsonl")
    return [
        {name: value for name, value in one.items() if "per_second" not in name and name != "time"}
        for one in found
    ]


def arrays(workdir):
    """Everything that a run restored or wrote, as bytes by file and name."""
    found = {
        (str(path.relative_to(workdir)), name): array.tobytes()
        for path in workdir.rglob("*.safetensors")
        for name, array in load_file(path).items()
    }
    for step in complete_steps(workdir):
        folder = (workdir / f"checkpoints/{step}/state").absolute()
        with ocp.PyTreeCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(folder).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
            tree = checkpointer.restore(folder, restore_args=kinds)
        leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
        found |= {(str(step), str(path)): np.asarray(leaf).tobytes() for path, leaf in leaves}
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_killed_at_random_moments_is_the_whole_run(task, processes, tmp_path, rng):
    config, fields = TASKS[task]
    program = [
        *(str(runs.ROOT / "tests/kills.py"), str(tmp_path)),
        *(str(runs.ROOT / f"configs/{config}.py"), json.dumps(fields())),
        *(str(processes), str(KILLS[processes]), str(rng.integers(2**31))),
    ]
    with runs.python(*program) as child:
        output, errors = child.communicate()
    assert child.returncode == 0, errors
    found = json.loads(output)
    starts, screen = found["starts"], found["screen"]
    print(json.dumps(starts))
    assert sum(bool(what) for _, _, what, _, _ in starts) == KILLS[processes], screen
    for folder, codes, what, _, orphans in starts:
        assert not orphans, (folder, what)
        assert what or codes == [0] * processes, screen
        assert not what or any(codes), (folder, what)
    whole, others = tmp_path / "whole", sorted(tmp_path.glob("killed_*[0-9]"))
    assert others
    for workdir in others:
        assert names(workdir) == names(whole)
        assert [*complete_steps(workdir)] == [*complete_steps(whole)]
        left = [str(p) for p in workdir.rglob("*") if "tmp" in p.name or "draft" in p.name]
        assert not left
        assert {p.name for p in (workdir / "checkpoints").iterdir()} == {
            str(step) for step in complete_steps(workdir)
        }
        assert records(workdir) == records(whole)
        assert arrays(workdir) == arrays(whole)
    assert not [str(p) for folder in tmp_path.glob("*.tmp") for p in Path(folder).iterdir()]
