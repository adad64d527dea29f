"""Adversarial training: what an attack sees and costs, and how a run lives with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from vision_jax import cost, figures, train
from vision_jax.errors import UserError
from vision_jax.logging import read_metrics
from vision_jax.objective import Objective
from vision_jax.recipes.adversarial import objective as adversarial
from vision_jax.recipes.adversarial.objective import ThreatModel
from vision_jax.tasks.classification import task as classify
from vision_jax.trees import lora, paths

ON = "('lora', 'adversarial')"


# The attack -------------------------------------------------------------------------------------

DRAW = np.random.default_rng(0)
IMAGES = DRAW.uniform(0, 1, (4, 3, 3, 2)).astype(np.float32)
SLOPES = DRAW.standard_normal((3, 3, 2)).astype(np.float32)
BATCH = {
    "image": jnp.asarray(IMAGES),
    "label": jnp.arange(4),
    "index": jnp.asarray([9, 2, 7, 4]),
    "mask": jnp.ones(4, bool),
    "step": jnp.int32(2),
}


def linear(seen):
    """An objective whose loss is Σ slope · pixel, its slopes in the view: what a recipe added."""

    def prepare(trainable, frozen, model_state, batch, key):
        return {**batch, "slopes": jnp.asarray(SLOPES)[None]}

    def forward(trainable, frozen, model_state, view, key, *, train):
        seen.append(train)
        return {"pixels": view["image"] * trainable["w"]}, model_state

    def criterion(trainable, outputs, view):
        return (outputs["pixels"] * view["slopes"]).sum((1, 2, 3)), {}

    return Objective(prepare, forward, criterion)


@pytest.mark.long
@pytest.mark.parametrize("warmup", [0, 5])
def test_the_criterion_itself_is_raised_in_evaluation_mode(warmup):
    seen = []
    threat_model = ThreatModel("linf", 0.1, step_size=2.5, steps=1, warmup_steps=warmup)
    goal = adversarial.on_adversarial_examples(linear(seen), threat_model)
    view = goal.prepare({"w": jnp.float32(3)}, {}, {}, BATCH, jax.random.key(0))
    radius = 0.1 * (3 / 5 if warmup else 1)  # the third step
    expected = (IMAGES + radius * np.sign(SLOPES)).clip(0, 1)
    np.testing.assert_allclose(view["image"], expected, atol=1e-6)
    assert set(seen) == {False}


@pytest.mark.long
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_image_is_attacked_the_same_in_any_batch(norm):
    """One step of little length: what is left is mostly the random start."""
    goal = adversarial.on_adversarial_examples(
        linear([]), ThreatModel(norm, 0.1, step_size=0.01, steps=1)
    )
    prepare = jax.jit(
        lambda batch: goal.prepare({"w": 1.0}, {}, {}, batch, jax.random.key(0))["image"]
    )
    whole = prepare(BATCH)
    rows = np.array([2, 0])
    part = {n: a[rows] if n != "step" else a for n, a in BATCH.items()}
    np.testing.assert_array_equal(prepare(part), whole[rows])
    moved = np.abs(whole - IMAGES).max((1, 2, 3))
    assert len(set(moved.tolist())) == 4
    assert (moved > 0.02).all()


@pytest.mark.long
def test_free_perturbations_begin_in_the_ball_and_stay_there():
    sizes = {"linf": np.max, "l2": lambda x, axes: np.sqrt((x**2).sum(axes))}
    uphill = jnp.broadcast_to(SLOPES, IMAGES.shape)
    for norm, size in sizes.items():
        replay = adversarial.make_replay(ThreatModel(norm, 0.2, step_size=1.0, steps=1), 3)
        first = replay.start(BATCH, jax.random.key(0))
        last = first
        for _ in range(2):  # enough to lead from one end to the other
            last = replay.move(last, uphill, jnp.int32(0))
            assert size(np.abs(last), (1, 2, 3)).max() <= 0.2 + 1e-6
        assert 0 < size(np.abs(first), (1, 2, 3)).max() <= 0.2 + 1e-6
        assert (size(np.abs(last), (1, 2, 3)) >= 0.2 - 1e-6).all()
        assert ((last * uphill).sum((1, 2, 3)) > (first * uphill).sum((1, 2, 3))).all()


# The step ---------------------------------------------------------------------------------------


# A model of more tokens than the tiny run's, next to which images are small as they always are.
GRID = {
    "model__weights": "",
    "model__variant": "vit",
    "model__arguments": "(('width', 32), ('depth', 1), ('num_heads', 2), ('mlp_width', 64), "
    "('patch_size', 2))",
}


@pytest.mark.long
@pytest.mark.parametrize("what", ["adapters", "everything"])
def test_an_attack_costs_its_passes_and_no_parameter_gradient_or_memory(what):
    """Per step of the attack: a forward pass and the input's gradient."""
    recipes, trainable = (ON, "head/.*") if what == "adapters" else ("('adversarial',)", ".*")
    plain = "('lora',)" if what == "adapters" else "()"
    sizes = {"batch_size": 32, "trainable": trainable, **GRID}
    attacked = runs.Prepared(recipes=recipes, adversarial__steps=4, **sizes)
    without = runs.Prepared(recipes=plain, **sizes)
    found, base = attacked.compiled(), without.compiled()
    expected = cost.count(base).flops + 4 * attacked.forward_and_input_gradient()
    assert cost.count(found).flops == pytest.approx(expected, rel=0.02)
    temp = [program.memory_analysis().temp_size_in_bytes for program in (base, found)]
    assert temp[1] <= 1.1 * temp[0], temp


@pytest.mark.long(but=["pgd"])
@pytest.mark.parametrize("method", ["pgd", "free"])
def test_one_compile_over_50_steps_and_frozen_leaves_bit_identical(method):
    prepared = runs.Prepared(
        recipes=ON,
        adversarial__method=method,
        adversarial__steps=1,
        adversarial__replays=2,
        adversarial__warmup_steps=20,
        adversarial__weight_epsilon=0.01,
        optim__ema_decay=0.9,
        total_steps=50,
    )
    before = {path: np.asarray(array).tobytes() for path, array in prepared.frozen.items()}
    state = prepared.state
    for _ in range(50):
        state, metrics = prepared.step(state, prepared.frozen, prepared.batch)
    assert prepared.step._cache_size() == 1
    assert bool(metrics["finite"])
    assert int(state.step) == 50
    counts = {int(x) for x in jax.tree.leaves(state.opt_state) if x.ndim == 0}
    assert counts == {100 if method == "free" else 50}  # updates: the schedule ends with the run
    assert float(metrics["learning_rate"]) < 1e-4
    after = {path: np.asarray(array).tobytes() for path, array in prepared.frozen.items()}
    assert after == before


@pytest.mark.long
@pytest.mark.parametrize("method", ["pgd", "trades", "free"])
def test_one_device_and_eight_give_the_same_numbers(method):
    losses = []
    for devices in (1, 8):
        prepared = runs.Prepared(
            devices,
            recipes=ON,
            adversarial__method=method,
            adversarial__steps=2,
            adversarial__replays=2,
            lora__dropout=0.0,
        )
        _, metrics = prepared.step(prepared.state, prepared.frozen, prepared.batch)
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.mark.long
def test_adapters_are_attacked_as_the_merged_model():
    prepared = runs.Prepared(recipes=ON)
    rng = np.random.default_rng(0)
    trainable = {
        path: jnp.asarray(rng.standard_normal(array.shape), jnp.float32) / 4
        for path, array in prepared.state.trainable.items()
    }
    merged = paths.flatten(lora.merge(prepared.plan.assemble({**trainable, **prepared.frozen})))
    like = jax.eval_shape(lora.merge, prepared.plan.like)
    batch = {**prepared.batch, "step": jnp.int32(0)}

    def seen(assemble, trainable, frozen):
        goal = classify.make_objective(
            prepared.config,
            prepared.model,
            "classes",
            prepared.apply,
            assemble,
            prepared.run.mesh,
        )
        goal = adversarial.on_adversarial_examples(
            goal, ThreatModel("l2", 0.5, step_size=0.5, steps=3)
        )
        return jax.jit(goal.prepare)(trainable, frozen, {}, batch, jax.random.key(0))["image"]

    ours = seen(prepared.plan.assemble, trainable, prepared.frozen)
    plain = seen(lambda flat: paths.unflatten(like, flat), merged, {})
    clean = prepared.batch["image"] / 255
    assert float(jnp.sqrt(((ours - clean) ** 2).sum((1, 2, 3))).min()) > 0.1
    np.testing.assert_allclose(ours, plain, atol=1e-5)


# The run ----------------------------------------------------------------------------------------


def adversarial_run(**fields):
    small = {"total_steps": 4, "evaluate__every": 3, "adversarial__watch": 12}
    return runs.tiny_config(recipes=ON, optim__ema_decay=0.5, **small, **fields)


@pytest.mark.long
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Bit-identical, with the method that changes the most in a step."""
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)

    class Interrupted(Exception):
        pass

    def interrupt(*arguments):
        raise Interrupted

    config = adversarial_run(adversarial__method="free", adversarial__replays=2)
    with monkeypatch.context() as patch:
        patch.setattr(classify.Evaluation, "line", interrupt)  # at step 3, after checkpoint 2
        with pytest.raises(Interrupted):
            train.run(config, tmp_path / "resumed")
    for name in ("resumed", "whole"):
        assert train.run(config, tmp_path / name) == 0
    ours, theirs = (load_file(tmp_path / n / "model.safetensors") for n in ("resumed", "whole"))
    assert {n: a.tobytes() for n, a in ours.items()} == {n: a.tobytes() for n, a in theirs.items()}
    last = read_metrics(tmp_path / "whole" / "metrics.jsonl")[-1]
    assert 0 <= last["eval/pgd_top1"] <= 1
    assert round(last["eval/fgsm_top1"] * 12, 6).is_integer()


def evaluation(fgsm, pgd, attacked=200):
    summary = {"fgsm_top1": fgsm, "pgd_top1": pgd, "attacked": attacked}
    summary |= {"top1": 0.5, "top5": 0.9, "loss": 1.0, "ece": 0.1, "count": 1000}
    return classify.Evaluation(np.zeros((1, 2)), np.zeros(1), np.zeros(1), summary, ())


def records(pairs):
    return [
        {"step": 10 * i, "eval/fgsm_top1": fgsm, "eval/pgd_top1": pgd}
        for i, (fgsm, pgd) in enumerate(pairs, 1)
    ]


# (FGSM, PGD) of 200 held-out images, every 150 updates of single-step training (step 2 epsilon) of
# a network of two convolutions on Fashion-MNIST at 14 x 14 pixels.
OVERFITTING = [(0.335, 0.135), (0.52, 0.105), (0.565, 0.055), (0.61, 0.07)]  # epsilon 0.25
OVERFITTING += [(0.625, 0.055), (0.69, 0.065), (0.69, 0.025)]
HEALTHY = [(0.465, 0.42), (0.52, 0.48), (0.53, 0.49), (0.575, 0.52)]  # epsilon 0.1
HEALTHY += [(0.585, 0.535), (0.59, 0.53), (0.58, 0.54), (0.565, 0.515), (0.585, 0.54)]
WARMED_UP = [(0.06, 0.0), (0.11, 0.005), (0.24, 0.025), (0.35, 0.08)]  # epsilon 0.3, over 500
WARMED_UP += [(0.39, 0.115), (0.475, 0.16), (0.555, 0.205), (0.57, 0.16)]


def test_catastrophic_overfitting_is_said():
    *before, (fgsm, pgd) = OVERFITTING
    (text,) = evaluation(fgsm, pgd).warnings(70, records(before))
    assert text.startswith(
        "catastrophic overfitting: since step 10 top-1 under PGD fell from 0.135"
    )
    assert "from 0.335 to 0.690" in text
    assert "\n" not in text
    for history in (HEALTHY, WARMED_UP):
        for end in range(len(history)):
            fgsm, pgd = history[end]
            found = evaluation(fgsm, pgd).warnings(10 * end + 10, records(history[:end]))
            assert found == [], history[end]
    # Both fell: that is another illness. And a fall on few images may be chance.
    assert evaluation(0.3, 0.025).warnings(70, records(before)) == []
    assert evaluation(0.69, 0.025, attacked=20).warnings(70, records(before)) == []


def test_without_attacks_an_evaluation_says_nothing_of_them():
    plain = evaluation(None, None, 0)
    assert "pgd" not in plain.line()
    assert plain.warnings(30, records([(0.5, 0.4)])) == []
    assert "fgsm_top1 0.5000  pgd_top1 0.4000" in evaluation(0.5, 0.4).line()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"adversarial__method": "pdg"}, "config.adversarial.method is 'pdg'"),
        ({"adversarial__epsilon": 0.0}, "config.adversarial.epsilon is 0.0: it must be above 0"),
        ({"adversarial__epsilon": -0.1}, "config.adversarial.epsilon is -0.1"),
        ({"adversarial__epsilon": 8.0}, "8 of 255 levels are 0.0314"),
        ({"adversarial__norm": "l1"}, "it must be linf or l2"),
        ({"adversarial__steps": 0}, "config.adversarial.steps is 0"),
        ({"adversarial__replays": 1}, "config.adversarial.replays is 1: it must be at least 2"),
        (
            {"adversarial__method": "mart", "augment__label_smoothing": 0.0, "augment__mixup": 0.2},
            "config.augment.mixup makes targets of several",
        ),
        ({"adversarial__method": "mart"}, "config.augment.label_smoothing makes targets"),
        (
            {"adversarial__method": "free", "optim__accumulate": 2, "batch_size": 16},
            "config.optim.accumulate is for",
        ),
    ],
)
def test_what_is_refused(fields, named, tmp_path):
    with pytest.raises(UserError) as caught:
        train.run(runs.tiny_config(recipes=ON, **fields), tmp_path / "run")
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
