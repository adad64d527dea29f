"""APGD, FAB, Square and AutoAttack beside torchattacks' ports of the published code, in float64.

torchattacks 3.5.1 departs from the published code in three places. Its AutoAttack makes 10 steps
and rescales Square's schedule, so its attacks are compared one by one and composed here. In L2 its
APGD steps as far in each example of a batch as in the first, and its Square holds one norm for all
channels; so there it is given one example, and images of one channel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchattacks
from jax.sharding import Mesh

from vision_jax.attacks import apgd, fab, losses, square
from vision_jax.attacks.autoattack import autoattack

SIDE, COUNT, CLASSES = 10, 12, 6
NAMES = {"linf": "Linf", "l2": "L2", "l1": "L1"}
RADII = {"linf": 0.02, "l2": 0.2, "l1": 1.5}


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """Also where they cast to float32 or store in it.

    Compiling takes longest; so let it be half. Threads would only wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


class Peer(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        rng = np.random.default_rng(channels)
        self.first = torch.nn.Parameter(
            torch.tensor(rng.normal(size=(SIDE**2 * channels, 10)) * 0.2)
        )
        self.second = torch.nn.Parameter(torch.tensor(rng.normal(size=(10, CLASSES)) * 0.5))
        self.eval().requires_grad_(False)

    def forward(self, images):
        flat = images.permute(0, 2, 3, 1).reshape(len(images), -1)
        return torch.tanh(flat @ self.first) @ self.second


class Case:
    """One model in both libraries; images, some with entries at the walls, and what they are."""

    def __init__(self, channels=3):
        rng = np.random.default_rng(5)
        self.peer = Peer(channels)
        self.images = rng.uniform(size=(COUNT, SIDE, SIDE, channels))
        self.images[:, :2] = rng.choice([0.0, 1.0], size=(COUNT, 2, SIDE, channels))
        self.tensor = tensor(self.images)
        order = self.peer(self.tensor).argsort(1)
        self.labels, self.targets = order[:, -1], order[:, -3].numpy()

    def logits_of_images(self, images):
        return logits_of_images((self.peer.first.numpy(), self.peer.second.numpy()), images)


def logits_of_images(weights, images):
    return jnp.tanh(images.reshape(len(images), -1) @ weights[0]) @ weights[1]


def tensor(images):
    return torch.tensor(np.transpose(images, (0, 3, 1, 2)).copy())


def last(images):
    return images.detach().permute(0, 2, 3, 1).numpy()


def noise(norm, shape, seed):
    """What they draw next, with the seed set once more."""
    torch.manual_seed(seed)
    drawn = 2 * torch.rand(shape) - 1 if norm == "linf" else torch.randn(shape)
    torch.manual_seed(seed)
    return last(drawn)


@pytest.mark.parametrize(("norm", "loss"), [("linf", "ce"), ("linf", "t"), ("l2", "dlr")])
def test_apgd_is_the_peers(norm, loss):
    case = Case()
    labels = jnp.array(case.labels.numpy())
    options = {"norm": NAMES[norm], "eps": RADII[norm], "steps": 100}
    if loss == "t":
        attack = torchattacks.APGDT(case.peer, n_classes=CLASSES, **options)
        attack.target_class = 3
        loss_of_images = losses.make_targeted_dlr(
            case.logits_of_images, labels, jnp.array(case.targets)
        )
    else:
        attack = torchattacks.APGD(case.peer, loss=loss, **options)
        loss_of_images = losses.make_untargeted(
            case.logits_of_images, labels, losses.dlr if loss == "dlr" else losses.cross_entropy
        )
    size = COUNT if norm == "linf" else 1
    drawn, theirs = [], []
    for first in range(0, COUNT, size):
        some = slice(first, first + size)
        drawn.append(noise(norm, case.tensor[some].shape, 3 + first))
        theirs.append(attack.attack_single_run(case.tensor[some], case.labels[some]))
    best, right, highest, fooling = (torch.cat(parts) for parts in zip(*theirs, strict=True))

    @jax.jit
    def single_run(images, noise):
        begin = apgd.start_from(noise, images, RADII[norm], norm)
        return apgd.single_run(
            loss_of_images, images, begin=begin, epsilon=RADII[norm], norm=norm, steps=100
        )

    run = single_run(case.images, np.concatenate(drawn))
    np.testing.assert_array_equal(run.fooled, ~right.numpy())
    np.testing.assert_allclose(run.f_max, highest, rtol=1e-9)
    # Where the label is third the plain DLR loss is flat, and its gradient in L2 mere rounding.
    clear = (highest.numpy() < 1 - 1e-6) | (loss != "dlr")
    assert clear.sum() > 2
    np.testing.assert_allclose(run.x_max[clear], last(best)[clear], atol=1e-10)
    np.testing.assert_allclose(run.x_adv[clear], last(fooling)[clear], atol=1e-10)


@pytest.mark.parametrize("norm", NAMES)
def test_fab_is_the_peers(norm):
    case = Case()
    epsilon = RADII[norm]
    attack = torchattacks.FAB(
        case.peer, NAMES[norm], epsilon, steps=30, multi_targeted=True, n_classes=CLASSES
    )
    attack.target_class = 3
    targeted = last(attack.attack_single_run_targeted(case.tensor, case.labels))
    drawn = noise(norm, case.tensor.shape, 1)
    flat = drawn.reshape(COUNT, -1)
    sizes = np.linalg.norm(flat, {"linf": np.inf, "l2": 2, "l1": 1}[norm], axis=1)
    begin = case.images + epsilon / 2 * drawn / sizes[:, None, None, None]
    untargeted = last(attack.attack_single_run(case.tensor, case.labels, use_rand_start=True))
    run = functools.partial(
        fab.fab, case.logits_of_images, labels=case.labels.numpy(), epsilon=epsilon, norm=norm,
        steps=30,
    )  # fmt: skip

    @jax.jit
    def both(images, begin):
        return run(images, targets=case.targets), run(images, start=jnp.clip(begin, 0, 1))

    for ours, theirs in zip(both(case.images, begin), (targeted, untargeted), strict=True):
        assert (np.abs(theirs - case.images).max((1, 2, 3)) > 1e-3).sum() > COUNT / 2
        np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_square_is_the_peers_with_its_draws(norm, monkeypatch):
    """Of one example in L2, as there each example that stands draws signs of its own."""
    case = Case(channels=3 if norm == "linf" else 1)
    count, channels = (COUNT, 3) if norm == "linf" else (1, 1)
    radius, queries = RADII[norm] * 0.8, 300
    attack = torchattacks.Square(
        case.peer, NAMES[norm], radius, n_queries=queries, resc_schedule=False
    )
    attack.init_hyperparam(case.tensor)
    drawn, rand = [], torch.rand

    def recording(*arguments):
        drawn.append(rand(*arguments))
        return drawn[-1]

    monkeypatch.setattr(torch, "rand", recording)
    torch.manual_seed(4)
    _, theirs = attack.attack_single_run(case.tensor[:count], case.labels[:count])
    signs = [np.sign(2 * array.numpy() - 1) for array in drawn]
    if norm == "linf":
        begun, each = 1, 3
        starts = signs[0].transpose(0, 2, 3, 1), np.zeros((count, 1, SIDE), bool)
    else:
        begun, each = 2 * 5 * 5, 6
        upright = np.array([array.item() > 0.5 for array in drawn[:begun:2]]).reshape(1, 5, 5)
        starts = np.stack(signs[1:begun:2]).reshape(1, 5, 5, 1), upright
    made = (len(drawn) - begun) // each
    assert made > 50
    places, turned, colors = np.zeros((made, 4)), np.zeros(made, bool), np.zeros((made, channels))
    for query in range(made):
        own = drawn[begun + query * each :][:each]
        places[query, : 2 if norm == "linf" else 4] = [x.item() for x in own[:-1]][:4]
        turned[query] = norm == "l2" and own[4].item() > 0.5
        colors[query] = signs[begun + query * each + each - 1].ravel()
    places, turned, colors = map(jnp.array, (places, turned, colors))

    def recorded(keys, number, channels):
        same = (places[number], colors[number], turned[number])
        return square.Draw(*(jnp.broadcast_to(x, (count, *x.shape)) for x in same))

    monkeypatch.setattr(square, "_draw", recorded)
    images, labels = case.images[:count], case.labels[:count].numpy()
    keys = jax.random.split(jax.random.key(0), count)
    begin = square._start_from(*map(jnp.array, starts), images, radius, norm)
    run = functools.partial(
        square.square, case.logits_of_images, labels=labels, keys=keys, epsilon=radius, norm=norm,
        queries=made, begun=begin,
    )  # fmt: skip
    ours = jax.jit(run)(images)
    assert np.abs(last(theirs) - begin).max() > 1e-3
    np.testing.assert_allclose(ours, last(theirs), atol=1e-10)


def test_the_ensembles_verdicts_are_the_peers():
    case = Case()
    common = {"norm": "Linf", "seed": 0}
    # A radius in the widest gap between two distances, by the peer's FAB.
    attack = torchattacks.FAB(
        case.peer, steps=30, multi_targeted=True, n_classes=CLASSES, eps=1, **common
    )
    found = []
    for attack.target_class in range(2, CLASSES + 1):
        moved = attack.attack_single_run_targeted(case.tensor, case.labels) - case.tensor
        size = moved.abs().amax((1, 2, 3)).numpy()
        found.append(np.where(size > 0, size, np.inf))
    near = np.sort(np.min(found, axis=0))
    after = 3 + (near[4:9] / near[3:8]).argmax()
    epsilon = float(np.sqrt(near[after] * near[after + 1]))
    steps, queries = 20, 60
    common |= {"eps": epsilon}
    attacks = (
        torchattacks.APGD(case.peer, steps=steps, **common),
        torchattacks.APGDT(case.peer, steps=steps, n_classes=CLASSES, **common),
        torchattacks.FAB(case.peer, steps=steps, multi_targeted=True, n_classes=CLASSES, **common),
        torchattacks.Square(case.peer, n_queries=queries, resc_schedule=False, **common),
    )
    robust = np.ones(COUNT, bool)
    accuracy = []
    for attack in attacks:
        rows = np.flatnonzero(robust)
        logits = case.peer(attack(case.tensor[rows], case.labels[rows]))
        robust[rows] = (logits.argmax(1) == case.labels[rows]).numpy()
        accuracy.append(robust.mean())
    verdicts = autoattack(
        logits_of_images,
        (case.peer.first.numpy(), case.peer.second.numpy()),
        case.images,
        case.labels.numpy(),
        epsilon=epsilon,
        mesh=Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")),
        steps=steps,
        queries=queries,
    )
    assert 0.2 < robust.mean() < 0.8
    np.testing.assert_array_equal(verdicts.robust, robust)
    assert list(verdicts.accuracy.values()) == [1, *accuracy]
