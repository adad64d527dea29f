"""The plan of a step against the step that training compiles."""

import contextlib
import dataclasses
import re

import detection_runs
import jax
import programs
import pytest
import runs
from test_configs import CONFIGS, small

from vision_jax import cost, main, scaling, train
from vision_jax.commands import plan
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.run.prepare import Run


def planned(config):
    return plan.compile_step(config, plan.describe_planned(config)[0])


@pytest.mark.long
@pytest.mark.parametrize(
    "make",
    [
        lambda: runs.full_config(mesh__fsdp=4, mesh__data=2, model__scan=True),
        lambda: detection_runs.tiny_config(total_steps=1),
    ],
    ids=["classification", "detection"],
)
def test_memory_is_what_xla_reports_of_the_step_that_trains(make, tmp_path, monkeypatch):
    config, made, called = make(), [], []
    make_step = Run.make_train_step

    def kept_step(run):
        step = make_step(run)

        def call(state, frozen, batch):
            called.append(
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                    (state, frozen, dict(batch)),
                )
            )
            return step(state, frozen, batch)

        made.append(step)
        return call

    monkeypatch.setattr(Run, "make_train_step", kept_step)
    monkeypatch.setattr(train, "write_results", lambda *arguments, **keywords: None)
    assert train.run(config, tmp_path) == 0
    monkeypatch.undo()
    found = planned(config)
    memory = made[0].lower(*called[0]).compile().memory_analysis()
    arguments = memory.argument_size_in_bytes
    assert found.temporary == pytest.approx(memory.temp_size_in_bytes, rel=0.05)
    # XLA leaves out arguments that the step does not read: masks and indices of the batch.
    assert 0 <= found.state + found.frozen + found.batch - arguments < 0.05 * arguments
    assert found.batch == sum(x.dtype.itemsize * x.size // 8 for x in jax.tree.leaves(called[0][2]))


@pytest.mark.long(but=["vit_lora"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_has_a_plan(path, monkeypatch):
    kept, count = [], cost.count
    monkeypatch.setattr(cost, "count", lambda compiled: kept.append(compiled) or count(compiled))
    found = planned(small(path))
    monkeypatch.undo()
    programs.check(path.stem, kept[0])
    assert found.flops > 0
    assert found.temporary > 0
    assert found.collectives["all-reduce"][1] > 0  # of gradients, among 8 devices


@pytest.mark.long
def test_sharding_divides_the_state_and_shows_its_communication():
    whole, parted = (
        planned(
            runs.tiny_config(mesh__fsdp=fsdp, sharding_rules=rules, recipes="()", trainable=".*")
        )
        for fsdp, rules in ((1, ()), (8, ((".*mlp/fc1/kernel", (None, "fsdp")),)))
    )
    kernel = 3 * 32 * 64 * 4  # and the two moments of AdamW
    assert whole.state - parted.state == kernel * 7 / 8
    assert "all-gather" in parted.collectives
    assert "all-gather" not in whole.collectives


@pytest.mark.long
def test_the_largest_batch_fits_and_the_next_does_not():
    config = runs.tiny_config()
    description = plan.describe_planned(config)[0]

    def total(batch_size):
        changed = config.copy_and_resolve_references()
        changed.batch_size = batch_size
        return plan.compile_step(changed, description).total

    budget = total(40) + 1
    found, size = plan.largest_batch(config, description, budget)
    assert size == total(found) <= budget < total(found + 8)
    assert plan.largest_batch(config, description, 1000) is None


def test_the_search_for_the_largest_batch_shows_how_far_it_is(capsys, monkeypatch):
    """Steps of 3 MiB and 1 MiB more an image: nothing is compiled here."""
    shown, done = [], []

    def compile_step(config, description):
        return plan.Plan(config.batch_size, 8, 1.0, 3 << 20, 0, config.batch_size << 20, 0, 0, {})

    @contextlib.contextmanager
    def show_progress(total, *, what):
        shown.append((total, what))
        yield lambda: done.append(what), print

    monkeypatch.setattr(plan, "compile_step", compile_step)
    monkeypatch.setattr(plan, "show_progress", show_progress)
    assert plan.run(runs.tiny_config(), memory=99.5 / 1024) == 0
    said = capsys.readouterr().out
    assert re.search(r"neither +96 \(12 a device\), 99.0 MiB compiled", said)
    assert re.search(r"By formula, \d+ images on 8 devices \(fsdp 1\)", said)
    assert shown == [(len(done), "compilations")]


def test_other_numbers_of_devices_are_arithmetic():
    """Of a plan on 8 devices in two groups: twice the devices move less than twice the bytes."""
    config = runs.tiny_config(mesh__data=2, mesh__fsdp=4)
    found = plan.Plan(
        *(16, 8, 4e12, 3 << 30, 0, 1 << 20, 20 << 30, 0, {}),
        whole_state=12 << 30,
        volume=scaling.Volume(4 << 30, 1 << 20),
    )
    said = "\n".join(plan.scaled(found, config, [8, 64]))
    assert "16 images on 8 devices (fsdp 4)" in said
    assert "128 images on 64 devices (fsdp 4)" in said
    received = 2 * (4 << 30) * 3 / 4 / 2**30
    assert re.search(rf"gathers of parameters +{received:.1f} GiB received by each", said)
    assert said.count("(does not fit)") == 2  # 23 GiB are too many for a v5e alone
    assert "a checkpoint of 12.0 GiB (12.9 s) each" in said
    assert "activations move" not in said
    moving = dataclasses.replace(found, collectives={"all-gather": (3, 9.0 * 2**30)})
    note = "note: the compiled step gathers 9.0 GiB, parameters are 8.0 GiB of it"
    assert note in "\n".join(plan.scaled(moving, config, [8]))
    with pytest.raises(UserError, match="6 devices do not divide into groups of fsdp=4"):
        plan.scaled(found, config, [6])


@pytest.mark.long
def test_without_data_and_weights_the_architecture_is_enough(capsys):
    fields = {"data.train": "gone", "model.weights": "gone.safetensors"}
    arguments = [
        "plan",
        f"--config={runs.ROOT / 'configs/vit_lora.py'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]
    assert main.main(arguments) == main.BAD_INPUT
    assert "set config.model.variant" in capsys.readouterr().err
    more = ["model.variant=ti/16", "model.image_size=32", "batch_size=8", "mesh.fsdp=8"]
    assert main.main([*arguments, *(f"--config.{one}" for one in more)]) == 0
    said = capsys.readouterr().out
    for part in ("without the weights", "with 1000 classes", "GFLOP a device", "all-gather"):
        assert part in said


def test_a_plan_needs_a_config(capsys):
    assert main.main(["plan"]) == main.BAD_INPUT
    assert "--config is missing" in capsys.readouterr().err
    config = runs.tiny_config(batch_size=12)
    with pytest.raises(UserError, match="does not divide among 8 devices"):
        planned(config)
    with pytest.raises(UserError, match="batch_size"):
        plan.run(load_config(str(CONFIGS[0]), {"batch_size": "0"}), None)
