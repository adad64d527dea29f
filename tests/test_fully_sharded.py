"""What a fully sharded step holds, moves and computes, read from the compiled program."""

import re

import jax
import numpy as np
import pytest
import runs
from jax.sharding import Mesh

from vision_jax import cost, sharding
from vision_jax.memory import device_bytes
from vision_jax.run.prepare import prepare


def prepared(monkeypatch, data, fsdp, mesh=None, **fields):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 256)  # a tiny ViT has no larger ones
    more = {"recipes": "()", "trainable": ".*", "mesh__data": data, "mesh__fsdp": fsdp, **fields}
    return prepare(runs.tiny_config(**more), mesh=mesh)


def sizes(arrays):
    """Bytes of what is split and of what is not."""
    found = [0, 0]
    for leaf in jax.tree.leaves(arrays):
        found[leaf.sharding.is_fully_replicated] += leaf.dtype.itemsize * leaf.size
    return found


def compiled(run):
    _, frozen = run.parameters.abstract()
    step = run.make_train_step()
    return step.lower(run.abstract_state, frozen, run.abstract_batch()).compile()


def gathered(text):
    """Shapes of what a compiled program gathers."""
    found = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", text)
    return {tuple(map(int, sides.split(","))) for sides in found}


def test_a_device_holds_an_eighth_and_what_does_not_divide(monkeypatch):
    run = prepared(monkeypatch, 1, 8, optim__ema_decay=0.9)
    split, whole = sizes(run.abstract_state)
    assert split > 10 * whole
    assert device_bytes(run.abstract_state) == split / 8 + whole


@pytest.mark.long
@pytest.mark.parametrize(("data", "fsdp"), [(1, 8), (2, 4)])
def test_parameters_are_gathered_twice_and_activations_stay(monkeypatch, data, fsdp):
    run = prepared(monkeypatch, data, fsdp)
    trainable, _ = run.parameters.abstract()
    split, whole = sizes(trainable)
    program = compiled(run)
    found = cost.count(program).collectives
    assert set(found) <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Images have no gradient, so nothing is asked of the first kernel in the backward pass, which
    # begins where the forward pass ends: the last kernel is still there.
    once = sizes([trainable["patch_embed/kernel"], trainable["block_0/mlp/fc2/kernel"]])[0]
    assert found["all-gather"][1] == 2 * split - once
    kernels = {leaf.shape for leaf in trainable.values()}
    assert gathered(program.as_text()) <= kernels
    if data == 1:  # the CPU's compiler writes a reduction that scatters as one, and a slice
        assert found["all-reduce"][1] == pytest.approx(split + whole, rel=0.01)
    plain = compiled(prepared(monkeypatch, 8, 1))
    assert cost.count(program).flops == cost.count(plain).flops  # nothing is computed again


ARGUMENTS = "(('width', 64), ('depth', 4), ('num_heads', 4), ('mlp_width', 256), ('patch_size', 4))"
RANDOM = {"model__weights": "", "model__variant": "vit", "model__arguments": ARGUMENTS}


@pytest.mark.long
@pytest.mark.parametrize("remat", [False, True])
def test_blocks_in_a_loop_gather_one_block_and_nothing_of_activations(monkeypatch, remat):
    fields = {"batch_size": 64, "model__remat": remat, **RANDOM}
    run = prepared(monkeypatch, 1, 8, model__scan=True, **fields)
    trainable, _ = run.parameters.abstract()
    program = compiled(run)
    found = cost.count(program).collectives
    assert set(found) == {"all-gather", "all-reduce"}
    split, whole = sizes(trainable)
    assert found["all-gather"][1] <= 2 * split
    assert found["all-reduce"][1] == pytest.approx(split + whole, rel=0.01)
    kernels = {leaf.shape for leaf in trainable.values()}
    kernels |= {(1, *shape) for shape in kernels}  # as the loop takes them from all blocks'
    assert gathered(program.as_text()) <= kernels
    if not remat:
        plain = cost.count(compiled(prepared(monkeypatch, 1, 8, **fields)))
        assert found["all-gather"] == plain.collectives["all-gather"]
        assert cost.count(program).flops == plain.flops


@pytest.mark.long
@pytest.mark.parametrize("remat", [False, True])
def test_temporaries_are_an_eighth(monkeypatch, remat):
    """Of a batch whose activations are most of them; recomputing blocks leaves what it leaves."""
    fields = {"batch_size": 256, "model__scan": True, "model__remat": remat, **RANDOM}
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))

    def temporary(run):
        return compiled(run).memory_analysis().temp_size_in_bytes

    whole = temporary(prepared(monkeypatch, 1, 1, mesh=one, **fields))
    assert temporary(prepared(monkeypatch, 1, 8, **fields)) <= 1.15 * whole / 8


@pytest.mark.long
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"optim__accumulate": 2, "optim__ema_decay": 0.9, "model__remat": True},
        {"model__scan": True},
        {"recipes": "('lora', 'adversarial')", "adversarial__steps": 2, "optim__name": "sgd"},
    ],
    ids=["plain", "accumulated", "scanned", "attacked adapters"],
)
def test_all_meshes_train_alike(monkeypatch, rng, fields):
    batch, found = None, {}
    for data, fsdp in [(8, 1), (1, 8), (2, 4)]:
        run = prepared(monkeypatch, data, fsdp, batch_size=16, **fields)
        state, frozen, _ = run.make_arrays()
        if batch is None:
            batch = {
                name: rng.integers(0, 3, leaf.shape).astype(leaf.dtype)
                for name, leaf in run.abstract_batch().items()
            }
        step, losses = run.make_train_step(), []
        for _ in range(3):
            state, metrics = step(state, frozen, sharding.make_batch_placer(run.mesh)(batch))
            losses.append(float(metrics["loss"]))
        assert bool(metrics["finite"])
        found[data, fsdp] = losses
    np.testing.assert_allclose(found[1, 8], found[8, 1], rtol=1e-6)
    np.testing.assert_allclose(found[2, 4], found[8, 1], rtol=1e-6)
