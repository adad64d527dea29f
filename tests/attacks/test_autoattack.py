"""APGD, FAB and Square against recorded runs of the published code; AutoAttack against the truth.

The truth is a linear model's: its nearest boundary is a gap of logits away, over the dual norm of a
difference of weights.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vision_jax.attacks import apgd, autoattack, fab, losses, norms, square
from vision_jax.errors import UserError

# Made by scripts/make_golden_autoattack.py, in float64.
GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "autoattack.npz"))
IMAGES, LABELS, TARGETS = (GOLDEN[name] for name in ("images", "labels", "targets"))
RADII = {"linf": 0.012, "l2": 0.12, "l1": 1.2}
NORMS = "linf", "l2", "l1"


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick():
    """Nearly all the time goes into compiling; so let it be half."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


ONE_DEVICE = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))


def logits_of_images(images):
    flat = images.reshape(len(images), -1)
    return jnp.tanh(flat @ GOLDEN["first"]) @ GOLDEN["second"]


def loss_of_images(loss):
    if loss == "targeted":
        return losses.make_targeted_dlr(logits_of_images, jnp.array(LABELS), jnp.array(TARGETS))
    return losses.make_untargeted(
        logits_of_images,
        jnp.array(LABELS),
        losses.dlr if loss == "dlr" else losses.cross_entropy,
    )


@pytest.mark.long(but=("ce-l2", "targeted-l1", "targeted-linf"))
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted"])
def test_apgd_goes_as_the_published_code_does(x64, quick, norm, loss):
    golden = {
        key.rsplit("/", 1)[1]: value
        for key, value in GOLDEN.items()
        if key.startswith(f"{norm}/{loss}/")
    }

    @jax.jit
    def single_run(images, noise):
        begin = apgd.start_from(noise, images, RADII[norm], norm)
        return apgd.single_run(
            loss_of_images(loss), images, begin=begin, epsilon=RADII[norm], norm=norm, steps=60
        )

    run = single_run(IMAGES, golden["noise"])
    np.testing.assert_array_equal(run.fooled, golden["fooled"])
    np.testing.assert_allclose(run.etas, golden["step_sizes"], rtol=1e-15)
    np.testing.assert_allclose(run.f_max, golden["loss"], rtol=1e-10)
    # Where the label is third the plain DLR loss is flat, and its gradient in L2 mere rounding.
    clear = (golden["loss"] < 1 - 1e-6) | (loss != "dlr") | (norm != "l2")
    assert clear.any()
    np.testing.assert_allclose(run.x_max[clear], golden["best"][clear], atol=1e-12)
    np.testing.assert_allclose(run.x_adv[clear], golden["adversarial"][clear], atol=1e-12)


def test_apgd_in_balls_that_shrink_goes_as_the_published_code_does(x64, quick):
    names = "noise", "best", "loss", "adversarial", "fooled"
    noise, best, loss, adversarial, fooled = (GOLDEN[f"l1/shrinking/{name}"] for name in names)

    @jax.jit
    def single_run(images):
        begin = apgd.start_from(noise, images, 3 * RADII["l1"], "l1")
        run = functools.partial(apgd.single_run, norm="l1", steps=60, shrinking=True)
        return run(loss_of_images("targeted"), images, begin=begin, epsilon=RADII["l1"])

    run = single_run(IMAGES)
    np.testing.assert_array_equal(run.fooled, fooled)
    np.testing.assert_allclose(run.f_max, loss, rtol=1e-10)
    np.testing.assert_allclose(run.x_max, best, atol=1e-12)
    np.testing.assert_allclose(run.x_adv, adversarial, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_walks_as_the_published_code_does(x64, quick, norm):
    run = functools.partial(fab.fab, logits_of_images, epsilon=RADII[norm], norm=norm, steps=30)
    found = jax.jit(lambda images: run(images, LABELS, targets=TARGETS))(IMAGES)
    assert (np.abs(GOLDEN[f"{norm}/fab"] - IMAGES).max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_allclose(found, GOLDEN[f"{norm}/fab"], atol=1e-11)


@pytest.mark.long(but=("linf",))
@pytest.mark.parametrize("norm", NORMS)
def test_square_with_the_published_codes_draws_ends_where_it_does(x64, quick, norm, monkeypatch):
    golden = {key: GOLDEN[f"{norm}/square/{key}"] for key in ("places", "query_signs", "result")}
    upright = jnp.array(GOLDEN[f"{norm}/square/query_upright"])
    places, signs = jnp.array(golden["places"]), jnp.array(golden["query_signs"])

    def recorded(keys, number, channels):
        return square.Draw(places[number][None], signs[number][None], upright[number][None])

    monkeypatch.setattr(square, "_draw", recorded)
    image, radius = IMAGES[:1], 2 * RADII[norm]
    begun = square._start_from(
        jnp.array(GOLDEN[f"{norm}/square/signs"]),
        jnp.array(GOLDEN[f"{norm}/square/upright"]),
        image,
        radius,
        norm,
    )
    keys = jax.random.split(jax.random.key(0), 1)
    run = functools.partial(square.square, logits_of_images, epsilon=radius, norm=norm, queries=100)
    found = jax.jit(lambda image: run(image, LABELS[:1], keys, begun=begun))(image)
    assert np.abs(golden["result"] - begun).max() > 1e-3
    np.testing.assert_allclose(found, golden["result"], atol=1e-11)


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 100])
def test_checkpoints_are_those_of_a_count(steps):
    window = max(int(0.22 * steps), 1)
    least, shorter = max(int(0.06 * steps), 1), max(int(0.03 * steps), 1)
    found, count = [], 0
    for number in range(1, steps + 1):
        count += 1
        if count == window:
            found.append(number)
            count, window = 0, max(window - shorter, least)
    assert apgd.checkpoints(steps) == tuple(found)


class Linear:
    """A linear model and 24 images away from the walls of the box, 2 of them misclassified."""

    def __init__(self, rng, norm, *, classes=5, unlikely=()):
        self.kernel = rng.normal(size=(72, classes))
        self.images = rng.uniform(0.35, 0.65, size=(24, 6, 6, 2)).astype(np.float32).astype(float)
        logits = self.images.reshape(24, -1) @ self.kernel
        # The classes as likely as each other, but for those that no attack shall reach.
        self.bias = -logits.mean(0) - 50.0 * np.isin(np.arange(classes), unlikely)
        logits += self.bias
        self.labels = logits.argmax(-1)
        self.labels[[3, 17]] = logits[[3, 17]].argsort(-1)[:, -2]
        self.weights = self.kernel, self.bias
        self.distance = self.distances(norm).min(-1)
        # Between two distances of the middle, as far from each as can be.
        near = np.sort(self.distance)
        last = 8 + (near[9:18] / near[8:17]).argmax()
        self.epsilon = float(np.sqrt(near[last] * near[last + 1]))
        assert norm == "l1" or np.abs(self.images - 0.5).max() + self.epsilon < 0.5

    def distances(self, norm):
        """To the boundary of each class, f[24, C]; 0 where it is passed, infinite to the label."""
        flat = self.images.reshape(24, -1)
        logits = flat @ self.kernel + self.bias
        found = np.full(logits.shape, np.inf)
        for row, target in np.ndindex(*found.shape):
            if target == self.labels[row]:
                continue
            slope = self.kernel[:, target] - self.kernel[:, self.labels[row]]
            gap = max(logits[row, self.labels[row]] - logits[row, target], 0)
            if norm != "l1":
                found[row, target] = gap / np.linalg.norm(slope, {"linf": 1, "l2": 2}[norm])
                continue
            # The steepest entries first, each up to the wall.
            room = np.where(slope > 0, 1 - flat[row], flat[row])
            order = np.argsort(-np.abs(slope))
            steepness, room = np.abs(slope)[order], room[order]
            left = gap - np.append(0, np.cumsum(steepness * room)[:-1])
            found[row, target] = np.clip(left / steepness, 0, room).sum()
        return found


def linear(weights, images):
    kernel, bias = weights
    return images.reshape(len(images), -1) @ kernel + bias[None]


def noisy(weights, images, keys):
    logits = linear(weights, images)
    return logits + 1e-4 * jax.vmap(lambda key: jax.random.normal(key, logits.shape[1:]))(keys)


TARGETED = ("apgd-t", 4), ("fab-t", 4)
ROUNDS = {
    ("standard", "linf"): [("apgd-ce", 1), *TARGETED, ("square", 3)],
    ("standard", "l1"): [*TARGETED],  # the others take long to compile
    ("plus", "l2"): [("apgd-ce", 5), ("apgd-dlr", 5), ("fab", 5), ("square", 1), *TARGETED],
    ("rand", "linf"): [("apgd-ce", 1), ("apgd-dlr", 1)],
}


def check(case, verdicts, seen, version, norm):
    """`seen` are all reports."""
    np.testing.assert_array_equal(verdicts.robust, case.distance > case.epsilon)
    assert [given[:3] for given in seen] == [
        (name, number + 1, rounds)
        for name, rounds in ROUNDS[version, norm]
        for number in range(rounds)
    ]
    standing = [22 / 24, *(share for *_, share in seen)]
    assert standing == sorted(standing, reverse=True)
    assert verdicts.accuracy == {"clean": 22 / 24} | {name: share for name, *_, share in seen}
    assert standing[-1] == np.mean(case.distance > case.epsilon)
    clean = np.array([name == "clean" for name in verdicts.fell_to])
    np.testing.assert_array_equal(clean, case.distance == 0)
    assert clean.sum() == 2
    fell = ~verdicts.robust & ~clean
    assert set(np.array(verdicts.fell_to)[fell]) <= {name for name, _ in ROUNDS[version, norm]}
    assert (linear(case.weights, verdicts.images).argmax(-1) != case.labels)[fell].all()
    np.testing.assert_array_equal(
        verdicts.images[~fell], case.images[~fell].astype(verdicts.images.dtype)
    )
    assert verdicts.images.min() >= 0
    assert verdicts.images.max() <= 1
    size = norms.size(jnp.array(verdicts.images - case.images), norm)
    assert size.max() <= case.epsilon + 1e-6


@pytest.mark.long
@pytest.mark.parametrize(("version", "norm"), list(ROUNDS)[1:])
def test_autoattack_finds_what_a_linear_model_withstands(quick, version, norm, rng):
    # Losses without a target need not find the nearest of several boundaries.
    case = Linear(rng, norm, unlikely=(2, 3, 4) if version == "rand" else ())
    seen = []
    verdicts = autoattack.autoattack(
        noisy if version == "rand" else linear,
        jax.tree.map(jnp.float32, case.weights),
        case.images.astype(np.float32),
        case.labels,
        epsilon=case.epsilon,
        norm=norm,
        version=version,
        attacks=tuple(name for name, _ in ROUNDS[version, norm]),
        mesh=ONE_DEVICE,
        steps=20,
        queries=40,
        report=lambda *given: seen.append(given),
    )
    check(case, verdicts, seen, version, norm)


@pytest.mark.long
def test_autoattack_depends_on_no_batch_and_attacks_only_what_stands(x64, quick, monkeypatch, rng):
    monkeypatch.setattr(autoattack, "QUERIES_A_CALL", 20)
    case = Linear(rng, "linf")
    order = rng.permutation(24)
    common = {"epsilon": case.epsilon, "steps": 10, "queries": 60}
    other = autoattack.autoattack(
        linear,
        case.weights,
        case.images[order],
        case.labels[order],
        index=7 * order,
        batch_size=8,
        **common,
    )
    attacked, seen, shares = set(), [], [1.0]

    def look(images):
        far = np.abs(np.asarray(images)[:, None] - case.images[None]).max((2, 3, 4))
        attacked.update(far.argmin(-1).tolist())

    def watched(weights, images):
        jax.debug.callback(look, images)
        return linear(weights, images)

    def report(*given):
        jax.effects_barrier()
        # The clean pass counts as of the first round.
        assert len(attacked) == round(24 * shares[-1])
        attacked.clear()
        seen.append(given)
        shares.append(given[-1])

    verdicts = autoattack.autoattack(
        watched,
        case.weights,
        case.images,
        case.labels,
        index=7 * np.arange(24),
        mesh=ONE_DEVICE,
        report=report,
        **common,
    )
    check(case, verdicts, seen, "standard", "linf")
    np.testing.assert_allclose(other.images, verdicts.images[order], atol=1e-12)
    np.testing.assert_array_equal(other.robust, verdicts.robust[order])
    assert other.fell_to == tuple(verdicts.fell_to[row] for row in order)
    assert other.accuracy == verdicts.accuracy


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_a_linear_models_boundary(x64, quick, norm, rng):
    case = Linear(rng, norm)
    nearest = case.distances(norm).argmin(-1)
    run = functools.partial(fab.fab, lambda images: linear(case.weights, images), norm=norm)
    found = jax.jit(
        lambda images: run(images, case.labels, epsilon=0.1, steps=40, targets=nearest)
    )(case.images)
    wrong = linear(case.weights, found).argmax(-1) != case.labels
    assert wrong.all()
    size = np.asarray(norms.size(found - case.images, norm)).ravel()
    np.testing.assert_array_equal(size == 0, case.distance == 0)
    ratio = size[case.distance > 0] / case.distance[case.distance > 0]
    assert ratio.min() >= 1 - 1e-12
    assert ratio.max() <= 1.02


def test_what_autoattack_refuses(rng):
    case = Linear(rng, "linf", classes=3)
    run = functools.partial(autoattack.autoattack, linear, case.weights, case.images, case.labels)
    with pytest.raises(UserError, match="no version 'plus' in 'l1'; there are standard in linf"):
        run(epsilon=1, norm="l1", version="plus")
    with pytest.raises(UserError, match="standard has no 'fab'; it has apgd-ce, apgd-t"):
        run(epsilon=1, attacks=("fab",))
    with pytest.raises(UserError, match="targeted dlr loss compares 4 classes and the model has 3"):
        run(epsilon=0.1, attacks=("apgd-t",))
    images = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(UserError, match="images of 4 x 4 pixels; needs 5 a side"):
        square.square(None, images, jnp.zeros(1, int), None, epsilon=1, norm="l2")
