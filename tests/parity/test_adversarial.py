"""Adversarial losses, gradients and BatchNorm statistics against restatements in PyTorch.

Each method below is written again from its paper's code, on a ResNet with BatchNorm that our
converter brings over, in float64. The starting points of attacks are ours; all else is torch's.
BatchNorm's statistics see the plain images, then the attacked ones: the code of TRADES passes the
plain ones once more, which changes no loss and no gradient, and is left out on both sides.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional as F

from vision_jax import convert, steps
from vision_jax.attacks.examples import keys_of
from vision_jax.certify.random_weights import randomize, randomize_statistics
from vision_jax.certify.references import make_reference
from vision_jax.models.families import build_model
from vision_jax.objective import Objective, make_loss
from vision_jax.ops import losses
from vision_jax.recipes.adversarial import objective as adversarial
from vision_jax.recipes.adversarial.objective import ThreatModel
from vision_jax.trees import paths

LIMIT = 1e-10
SIZE, CLASSES, BATCH = (16, 16), 5, 6
EPSILON, STEP, STEPS, BETA = 0.05, 0.25, 3, 5.0
SMALL = {
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8],
    "depths": [1],
    "num_labels": CLASSES,
}
KEY = jax.random.key(7)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    reference = make_reference("transformers", "ResNetForImageClassification", SMALL)
    randomize(reference.module, 3)
    randomize_statistics(reference, SIZE, 3, 3)
    weights = convert.read_weights(reference.save(tmp_path_factory.mktemp("reference")))
    _, arguments = convert.recognize(weights)
    return reference, weights, arguments


class Ours:
    """Our model and a batch, in float64."""

    def __init__(self, rng, reference, low=0.0, high=1.0):
        _, weights, self.arguments = reference
        self.model = build_model("resnet", **self.arguments, dtype=jnp.float64)
        shape = (1, *SIZE, 3)
        like = jax.eval_shape(self.model.init, jax.random.key(0), jnp.zeros(shape))
        target = paths.flatten(like["params"]) | paths.flatten(like["batch_stats"])
        flat = convert.import_weights(weights, target, self.arguments)
        flat = {
            p: jnp.asarray(x, jnp.int32 if p.endswith("count") else jnp.float64)
            for p, x in flat.items()
        }
        self.like = like
        self.params = {path: flat[path] for path in paths.flatten(like["params"])}
        self.state = paths.unflatten(
            like["batch_stats"], {path: flat[path] for path in paths.flatten(like["batch_stats"])}
        )
        images = rng.uniform(low - 0.2, high + 0.2, (BATCH, *SIZE, 3)).clip(low, high)
        self.batch = {
            "image": jnp.asarray(images),
            "label": jnp.asarray(rng.integers(0, CLASSES, BATCH)),
            "index": jnp.asarray(rng.permutation(100)[:BATCH]),
            "mask": jnp.ones(BATCH, bool),
            "step": jnp.int32(4),
        }

    def objective(self):
        def prepare(trainable, frozen, model_state, batch, key):
            target = jax.nn.one_hot(batch["label"], CLASSES, dtype=jnp.float64)
            return {**batch, "target": target}

        def forward(trainable, frozen, model_state, view, key, *, train):
            params = paths.unflatten(self.like["params"], trainable)
            variables = {"params": params, "batch_stats": model_state}
            if not train:
                return {"logits": self.model.apply(variables, view["image"])}, model_state
            logits, changed = self.model.apply(
                variables, view["image"], train=True, mutable=["batch_stats"]
            )
            return {"logits": logits}, changed["batch_stats"]

        def criterion(trainable, outputs, view):
            return losses.cross_entropy(outputs["logits"], view["target"]), {}

        return Objective(prepare, forward, criterion)

    def named(self, flat, model_state):
        """In transformers' names and layouts."""
        everything = {**flat, **paths.flatten(model_state)}
        host = {path: np.asarray(array) for path, array in everything.items()}
        return convert.export_weights(host, "resnet", self.arguments, to="transformers")[0]


class Theirs:
    """The same in torch."""

    def __init__(self, reference, ours):
        source, _, arguments = reference
        self.net = copy.deepcopy(source.module).double()
        self.mean, self.std = (
            torch.tensor(arguments[n], dtype=torch.float64).reshape(3, 1, 1)
            for n in ("mean", "std")
        )
        self.x = to_torch(ours.batch["image"])
        self.y = torch.from_numpy(np.array(ours.batch["label"])).long()

    def __call__(self, x, net=None):
        return (net or self.net)((x - self.mean) / self.std).logits


def to_torch(images):
    return torch.from_numpy(np.array(images).transpose(0, 3, 1, 2))


def kl(adversarial_logits, plain_logits):
    return F.kl_div(
        F.log_softmax(adversarial_logits, 1), F.softmax(plain_logits, 1), reduction="sum"
    )


def climb(theirs, loss_of, start, steps, step_size):
    """Attack loops of the papers' code, the model in evaluation mode."""
    theirs.net.eval()
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(x_adv), [x_adv])
        x_adv = x_adv.detach() + step_size * torch.sign(grad)
        x_adv = torch.min(torch.max(x_adv, theirs.x - EPSILON), theirs.x + EPSILON)
        x_adv = torch.clamp(x_adv, 0.0, 1.0)
    theirs.net.train()
    return x_adv.detach()


def cross_entropy_of(theirs):
    return lambda x: F.cross_entropy(theirs(x), theirs.y, reduction="sum")


def pgd_loss(theirs, start, steps, step_size):
    x_adv = climb(theirs, cross_entropy_of(theirs), start, steps, step_size)
    return lambda net=None: F.cross_entropy(theirs(x_adv, net), theirs.y)


def trades_loss(theirs, start, steps, step_size):
    def divergence(x):
        return kl(theirs(x), theirs(theirs.x))

    x_adv = climb(theirs, divergence, start, steps, step_size)

    def loss(net=None):
        plain = theirs(theirs.x, net)
        robust = kl(theirs(x_adv, net), plain) / BATCH
        return F.cross_entropy(plain, theirs.y) + BETA * robust

    return loss


def mart_loss(theirs, start, steps, step_size):
    x_adv = climb(theirs, cross_entropy_of(theirs), start, steps, step_size)
    y = theirs.y

    def loss(net=None):
        logits = theirs(theirs.x, net)
        logits_adv = theirs(x_adv, net)
        adv_probs = F.softmax(logits_adv, dim=1)
        top = torch.argsort(adv_probs, dim=1)[:, -2:]
        new_y = torch.where(top[:, -1] == y, top[:, -2], top[:, -1])
        margin = F.nll_loss(torch.log(1.0001 - adv_probs + 1e-12), new_y)
        nat_probs = F.softmax(logits, dim=1)
        true_probs = torch.gather(nat_probs, 1, y.unsqueeze(1)).squeeze()
        divergence = F.kl_div(torch.log(adv_probs + 1e-12), nat_probs, reduction="none").sum(1)
        robust = (divergence * (1.0000001 - true_probs)).sum() / BATCH
        return F.cross_entropy(logits_adv, y) + margin + BETA * robust

    return loss


def perturbed_gradient(theirs, loss, gamma):
    """AWP's order: a proxy climbs, its direction is rescaled, weights move, gradient, weights back.

    The proxy keeps its BatchNorm statistics to itself.
    """
    proxy = copy.deepcopy(theirs.net)
    optimizer = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-loss(proxy)).backward()
    optimizer.step()
    moved, kept = dict(proxy.named_parameters()), {}
    with torch.no_grad():
        for name, weight in theirs.net.named_parameters():
            if weight.dim() <= 1:
                continue
            difference = moved[name] - weight
            kept[name] = weight.clone()
            weight.add_(gamma * weight.norm() / (difference.norm() + 1e-20) * difference)
    value = loss()
    value.backward()
    with torch.no_grad():
        for name, weight in theirs.net.named_parameters():
            if name in kept:
                weight.copy_(kept[name])
    return value


def assert_same(ours, named, theirs):
    """Gradients (`named` has them under the parameters' names) and BatchNorm's statistics."""
    for name, parameter in theirs.net.named_parameters():
        close(named[name], parameter.grad, name)
    for name, buffer in theirs.net.named_buffers():
        if buffer.is_floating_point():
            close(named[name], buffer, name)


def close(ours, theirs, name):
    theirs = theirs.detach().numpy()
    assert np.abs(np.asarray(ours) - theirs).max() <= LIMIT * max(np.abs(theirs).max(), 1e-3), name


CASES = {
    "pgd": ("pgd", pgd_loss, STEPS, STEP, 0.0),
    "fast": ("fast", pgd_loss, 1, 1.25, 0.0),
    "trades": ("trades", trades_loss, STEPS, STEP, 0.0),
    "mart": ("mart", mart_loss, STEPS, STEP, 0.0),
    "pgd, awp": ("pgd", pgd_loss, STEPS, STEP, 0.01),
    "trades, awp": ("trades", trades_loss, STEPS, STEP, 0.005),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_statistics_are_the_papers(name, reference, rng):
    method, restated, attack_steps, step, gamma = CASES[name]
    ours = Ours(rng, reference)
    theirs = Theirs(reference, ours)
    threat_model = ThreatModel("linf", EPSILON, step_size=step, steps=attack_steps)
    goal = adversarial.make_adversarial(
        ours.objective(), method, threat_model, beta=BETA, weight_epsilon=gamma
    )
    (value, (model_state, _)), gradient = jax.jit(
        jax.value_and_grad(make_loss(goal), has_aux=True)
    )(ours.params, {}, ours.state, ours.batch, KEY)

    # The start is what an attack with steps of no length returns.
    prepare_key, _ = jax.random.split(KEY)
    attack_key = jax.random.fold_in(prepare_key, adversarial.ATTACK)
    stay = ThreatModel("linf", EPSILON, step_size=0.0, steps=1)
    loss = lambda images: (images.sum((1, 2, 3)), jnp.zeros(BATCH, bool))  # noqa: E731
    noise = 0.0
    if method in ("trades", "mart"):  # these may begin a little outside of the box
        noise = 1e-3
        normal = adversarial._normal(keys_of(attack_key, ours.batch["index"]), ours.batch["image"])
        start = ours.batch["image"] + noise * normal
    else:
        start = stay.attack(loss, ours.batch, prepare_key)
        assert float(jnp.abs(start - ours.batch["image"]).max()) > 0.9 * EPSILON
    lowered = restated(theirs, to_torch(start), attack_steps, step * EPSILON)
    if gamma:
        expected = perturbed_gradient(theirs, lowered, gamma)
    else:
        expected = lowered()
        expected.backward()
    assert abs(float(value) - expected.item()) <= LIMIT * abs(expected.item())
    assert_same(ours, ours.named(gradient, model_state), theirs)


def test_free_training_is_the_papers(reference, rng):
    """Three updates on a batch: SGD's, each with the perturbation that the last backward left."""
    times, rate = 3, 0.05
    ours = Ours(rng, reference, 0.3, 0.7)  # nowhere near the box
    theirs = Theirs(reference, ours)
    threat_model = ThreatModel("linf", EPSILON, step_size=1.0, steps=1)
    replay = adversarial.make_replay(threat_model, times)
    tx = optax.sgd(rate, momentum=0.9)
    state = steps.make_state(jax.tree.map(jnp.copy, ours.params), ours.state, tx=tx, ema=False)
    step = steps.make_train_step(
        make_loss(adversarial.replayed(ours.objective())),
        tx,
        seed=11,
        schedule=lambda number: number,
        replay=replay,
    )
    batch = {name: array for name, array in ours.batch.items() if name != "step"}
    start_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(11), 0), steps.REPLAY)
    noise = to_torch(replay.start({**batch, "step": jnp.int32(0)}, start_key))
    state, metrics = step(state, {}, batch)

    optimizer = torch.optim.SGD(theirs.net.parameters(), lr=rate, momentum=0.9)
    theirs.net.train()
    values = []
    for _ in range(times):
        noise_batch = noise.clone().requires_grad_()
        x = (theirs.x + noise_batch).clamp(0, 1)
        value = F.cross_entropy(theirs(x), theirs.y)
        optimizer.zero_grad()
        value.backward()
        noise = (noise + EPSILON * torch.sign(noise_batch.grad)).clamp(-EPSILON, EPSILON)
        optimizer.step()
        values.append(value.item())
    assert abs(float(metrics["loss"]) - np.mean(values)) <= LIMIT
    assert float(metrics["learning_rate"]) == 1.0  # the mean of 0, 1, 2
    named = ours.named(state.trainable, state.model_state)
    for name, tensor in theirs.net.state_dict().items():
        if tensor.is_floating_point():
            close(named[name], tensor, name)
