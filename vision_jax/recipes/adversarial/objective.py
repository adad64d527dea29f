"""Adversarial training: attacks maximize the loss over perturbations, training minimizes it.

    pgd      the loss of adversarial examples (Madry et al. 2018, https://arxiv.org/abs/1706.06083)
    fast     the same with one step from a random start (Wong et al. 2020, 2001.03994)
    free     the update's own gradient moves the perturbation too (Shafahi et al. 2019, 1904.12843)
    trades   the loss of plain images, and their divergence (Zhang et al. 2019, 1901.08573)
    mart     the same, weighted by how wrong the model is (Wang et al. 2020)
    weights  besides: kernels are shifted to maximize the loss (AWP; Wu et al. 2020, 2004.05884)

An attack maximizes the criterion of the objective that it is given, whatever that is, and through
whatever stands in for kernels: adapters learn against attacks on the merged model. While attacked,
the model is as in evaluation (BatchNorm with its running statistics, no dropout), as in the papers'
code for trades and mart. Attacks differentiate with respect to images alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from vision_jax import optim
from vision_jax.attacks import gradient, norms
from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.losses import LossOfImages
from vision_jax.objective import Objective, Outputs, View, after, zero_after
from vision_jax.steps import Flat, Replay

Array = jax.Array

METHODS = ("pgd", "fast", "free", "trades", "mart")
NOISE = 1e-3  # standard deviation of the start of trades and mart, as in the papers' code
ATTACK = 1_000_003  # folded into the view's key: the view itself is the same with and without


@dataclass(frozen=True)
class ThreatModel:
    """What an attack may change, and its budget of steps.

    Attributes:
      norm: of perturbations, "linf" or "l2".
      epsilon: the radius of the ball, in units of images in [0, 1].
      step_size: norm of an attack's step, as a share of the radius.
      steps: number of steps.
      warmup_steps: the radius grows linearly to epsilon over so many steps of training.
    """

    norm: Literal["linf", "l2"]
    epsilon: float
    step_size: float
    steps: int
    warmup_steps: int = 0

    def radius(self, step: Array) -> ArrayLike:
        """In training, at the step of this 0-based index."""
        if not self.warmup_steps:
            return self.epsilon
        return self.epsilon * jnp.minimum(1.0, (step + 1) / self.warmup_steps)

    def attack(self, loss: LossOfImages, view: View, key: Array, *, noise: float = 0.0) -> Array:
        """The adversarial examples f[B, H, W, C] of the view.

        The attack starts at a random point of the ball, or at the images with normal noise of this
        standard deviation.
        """
        images, radius = view["image"], self.radius(view["step"])
        keys = keys_of(jax.random.fold_in(key, ATTACK), view["index"])
        return gradient.pgd(
            loss,
            images,
            keys,
            norm=self.norm,
            epsilon=radius,
            step_size=self.step_size * radius,
            steps=self.steps,
            start=images + noise * _normal(keys, images) if noise else None,
            pixel_mask=view.get("pixel_mask"),
        )


def make_adversarial(
    objective: Objective,
    method: str,
    threat_model: ThreatModel,
    *,
    beta: float = 6.0,
    weight_epsilon: float = 0.0,
) -> Objective:
    """The objective of one of METHODS, with AWP on top if `weight_epsilon` is above 0."""
    if method in ("pgd", "fast"):
        objective = on_adversarial_examples(objective, threat_model)
    elif method == "free":
        objective = replayed(objective)
    elif method == "trades":
        objective = trades(objective, threat_model, beta=beta)
    else:
        objective = mart(objective, threat_model, beta=beta)
    return perturb_weights(objective, weight_epsilon) if weight_epsilon else objective


def on_adversarial_examples(objective: Objective, threat_model: ThreatModel) -> Objective:
    """The objective of adversarial examples alone: pgd, and fast with one step of 1.25 radii."""

    def prepare(trainable, frozen, model_state, batch, key):
        view = objective.prepare(trainable, frozen, model_state, batch, key)
        loss = _criterion_of_images(objective, trainable, frozen, model_state, view)
        return {**view, "image": threat_model.attack(loss, view, key)}

    return replace(objective, prepare=prepare)


def trades(objective: Objective, threat_model: ThreatModel, *, beta: float) -> Objective:
    """loss(plain) + beta · KL(plain ‖ adversarial), the attack maximizing the divergence.

    Both forward passes are in training mode, the plain one first, and BatchNorm's statistics see
    both; neither side's gradient is stopped. The paper's code runs the plain images through once
    more, with the same outputs and one more update of those statistics.
    """

    def prepare(trainable, frozen, model_state, batch, key):
        view = objective.prepare(trainable, frozen, model_state, batch, key)
        outputs_of_images = _outputs_of_images(objective, trainable, frozen, model_state, view)
        plain = outputs_of_images(view["image"])["logits"]

        def loss(images):
            divergence = _divergence(plain, outputs_of_images(images)["logits"])
            return divergence, jnp.zeros(divergence.shape, bool)

        return _with_adversarial(view, threat_model.attack(loss, view, key, noise=NOISE))

    def criterion(trainable, outputs, view):
        loss, metrics = objective.criterion(trainable, outputs, view)
        divergence = _divergence(outputs["logits"], outputs["adversarial"]["logits"])
        return loss + beta * divergence, {**metrics, "divergence": divergence.mean()}

    return Objective(prepare, _forward_both(objective), criterion)


def mart(objective: Objective, threat_model: ThreatModel, *, beta: float) -> Objective:
    """loss(adversarial) + margin(adversarial) + beta · KL(plain ‖ adversarial) · (1 - p(plain)).

    The margin is -log(1 - the largest probability of another class), p that of the label. The
    attack maximizes the objective's own criterion, as the paper's the cross-entropy; forward
    passes and small constants are as in its code (https://github.com/YisenWang/MART).
    """

    def prepare(trainable, frozen, model_state, batch, key):
        view = objective.prepare(trainable, frozen, model_state, batch, key)
        loss = _criterion_of_images(objective, trainable, frozen, model_state, view)
        return _with_adversarial(view, threat_model.attack(loss, view, key, noise=NOISE))

    def criterion(trainable, outputs, view):
        loss, metrics = objective.criterion(trainable, outputs["adversarial"], view)
        logits = _precise(outputs["logits"])
        adversarial_logits = _precise(outputs["adversarial"]["logits"])
        plain, adversarial = jax.nn.softmax(logits), jax.nn.softmax(adversarial_logits)
        own = jax.nn.one_hot(view["label"], logits.shape[-1], dtype=bool)
        margin = -jnp.log(1.0001 - jnp.where(own, 0, adversarial).max(-1) + 1e-12)
        divergence = plain * (jax.nn.log_softmax(logits) - jnp.log(adversarial + 1e-12))
        doubt = 1.0000001 - jnp.where(own, plain, 0).sum(-1)
        divergence = divergence.sum(-1)
        metrics = {**metrics, "divergence": divergence.mean()}
        return loss + margin + beta * divergence * doubt, metrics

    return Objective(prepare, _forward_both(objective), criterion)


def perturb_weights(objective: Objective, epsilon: float) -> Objective:
    """Minimizes the objective at kernels shifted by epsilon · |w| along its gradient there (AWP).

    The shift is constant in the gradient. Biases, norms and position embeddings stay; of adapters,
    the factors are shifted. Weight decay acts on the parameters as they are.
    """

    def forward(trainable, frozen, model_state, view, key, *, train):
        if not train:
            return objective.forward(trainable, frozen, model_state, view, key, train=False)

        def loss(trainable):
            seen = jax.lax.stop_gradient(view)
            outputs, _ = objective.forward(trainable, frozen, model_state, seen, key, train=True)
            return objective.criterion(trainable, outputs, seen)[0].mean()

        gradients = jax.grad(loss)(jax.lax.stop_gradient(trainable))
        shifted = {
            path: array + epsilon * jax.lax.stop_gradient(_rescaled(gradients[path], array))
            if optim.is_decayed(path, array)
            else array
            for path, array in trainable.items()
        }
        return objective.forward(shifted, frozen, model_state, view, key, train=True)

    return replace(objective, forward=forward)


def replayed(objective: Objective) -> Objective:
    """The objective of images plus the batch's "perturbation" f[B, H, W, C]; see `make_replay`."""

    def forward(trainable, frozen, model_state, view, key, *, train):
        images = view["image"] + view["perturbation"]
        # The gradient is that at the image which is seen: where the box stops a pixel, the paper's
        # clip has none, and a pixel that left would never come back.
        images += jax.lax.stop_gradient(jnp.clip(images, 0, 1) - images)
        view = {**view, "image": images}
        return objective.forward(trainable, frozen, model_state, view, key, train=train)

    return replace(objective, forward=forward)


def make_replay(threat_model: ThreatModel, times: int) -> Replay:
    """How free training perturbs: `times` updates a batch, each a step of the perturbation.

    It begins anew in each batch, at a random point of the ball, so that a step depends on nothing
    but its seed and index. (The paper's code hands the last batch's perturbation on to the next,
    whose images are others.) The updates of a batch share their augmentation and dropout.
    """

    def start(batch: Mapping[str, Array], key: Array) -> Array:
        gray = jnp.full(batch["image"].shape, 0.5)  # around it, the ball is not cut by the box
        keys, radius = keys_of(key, batch["index"]), threat_model.radius(batch["step"])
        return norms.random_start(keys, gray, radius, threat_model.norm) - gray

    def move(perturbation: Array, ascent: Array, step: Array) -> Array:
        gray, radius = jnp.full_like(perturbation, 0.5), threat_model.radius(step)
        step_size = norms.per_example(threat_model.step_size * radius, gray)
        moved = gray + perturbation + step_size * norms.steepest(ascent, gray, threat_model.norm)
        return norms.project(moved, gray, radius, threat_model.norm) - gray

    return Replay(times, start, move)


def _with_adversarial(view: View, adversarial: Array) -> View:
    """Both images; the plain one waits for the attack, so that its training pass does too."""
    plain = after(zero_after(adversarial), view["image"])
    return {**view, "image": plain, "adversarial": adversarial}


def _outputs_of_images(
    objective: Objective, trainable: Flat, frozen: Flat, model_state: Any, view: View
) -> Callable[[Array], Outputs]:
    """The model while it is attacked: images -> outputs, nothing random, no state updated."""

    def outputs_of_images(images):
        # Sharded parameters are gathered for each pass anew, as a training step does, and not kept
        # whole from the first pass of an attack to the last.
        images, *arrays = jax.lax.optimization_barrier((images, trainable, frozen))
        seen, key = {**view, "image": images}, jax.random.key(0)  # nothing is drawn
        return objective.forward(*arrays, model_state, seen, key, train=False)[0]

    return outputs_of_images


def _criterion_of_images(
    objective: Objective, trainable: Flat, frozen: Flat, model_state: Any, view: View
) -> LossOfImages:
    """The objective's own criterion, to be maximized for all examples, fooled ones too."""
    outputs_of_images = _outputs_of_images(objective, trainable, frozen, model_state, view)

    def loss(images):
        seen = {**view, "image": images}
        losses, _ = objective.criterion(trainable, outputs_of_images(images), seen)
        return losses, jnp.zeros(losses.shape, bool)

    return loss


def _forward_both(objective: Objective) -> Callable[..., tuple[Outputs, Any]]:
    """The plain images' outputs, and under "adversarial" those of the adversarial examples."""

    def forward(trainable, frozen, model_state, view, key, *, train):
        plain_key, adversarial_key = jax.random.split(key)
        outputs, model_state = objective.forward(
            trainable, frozen, model_state, view, plain_key, train=train
        )
        view = {**view, "image": view["adversarial"]}
        adversarial, model_state = objective.forward(
            trainable, frozen, model_state, view, adversarial_key, train=train
        )
        return {**outputs, "adversarial": adversarial}, model_state

    return forward


def _divergence(logits: Array, others: Array) -> Array:
    """KL(softmax(logits) || softmax(others)) of each example, f[B]."""
    log_p, log_q = jax.nn.log_softmax(_precise(logits)), jax.nn.log_softmax(_precise(others))
    return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def _precise(logits: Array) -> Array:
    return logits.astype(np.promote_types(logits.dtype, np.float32))


def _rescaled(direction: Array, like: Array) -> Array:
    """The direction at the norm of `like`."""
    size = jnp.linalg.norm(direction.ravel())
    return direction * (jnp.linalg.norm(like.ravel()) / jnp.where(size > 0, size, 1))


def _normal(keys: Array, images: Array) -> Array:
    draw = partial(jax.random.normal, shape=images.shape[1:], dtype=images.dtype)
    return jax.vmap(draw)(keys)
