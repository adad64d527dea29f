"""A training loss in three parts, so that a technique changes one and leaves the others alone.

    batch --prepare--> view --forward--> outputs --criterion--> losses

A recipe takes an Objective and gives an Objective back. Adversarial training perturbs the images of
the view (`prepare`); distillation adds teacher outputs to the view and a term to the criterion. So
they compose: an attack against a distilling objective is robust distillation, without more code.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vision_jax.steps import Flat, LossFn, Metrics

# What the model and the criterion see of a batch: "image" f32[B, H, W, C] in [0, 1], augmented;
# the task's targets; "mask" bool[B] and "index" i32[B]; "step" i32[], updates done.
# "pixel_mask" bool[B, H, W, 1] where images are padded: True inside of them. In a micro-batch
# "whole", a dict of what must be counted over all of the update (see steps.make_train_step).
View = Mapping[str, jax.Array]
Batch = Mapping[str, jax.Array]
Outputs = Mapping[str, Any]
# apply(params, model_state, images, *, train, keys) -> (outputs, model_state); outputs are a
# dict of "logits", a detector's boxes, and "features" where it was asked for any.
Apply = Callable[..., tuple[dict[str, Any], Any]]


@dataclass(frozen=True)
class Average:
    """How a loss uses the moving average of what trains (see steps.make_train_step).

    Attributes:
      prefix: under which it finds the average among the frozen arrays.
      decay: of the average by update.
    """

    prefix: str
    decay: Callable[[Any], jax.Array]


@dataclass(frozen=True)
class Objective:
    """What training minimizes: the mean of the criterion over the examples of a batch.

    Attributes:
      prepare: (trainable, frozen, model_state, batch, key) -> view. Augmentation, and what
        recipes add to the view: adversarial examples, teacher outputs. No gradient passes from it
        to the parameters.
      forward: (trainable, frozen, model_state, view, key, *, train) -> (outputs, model_state). With
        train=False nothing is random, BatchNorm uses its running statistics, and the state that
        comes back is the one given.
      criterion: (trainable, outputs, view) -> (losses f32[B], metrics). The mean of the losses is
        the loss; metrics are scalars by name.
      counted: the metric, if any, by which losses and metrics are divided (see
        steps.make_train_step). A recipe that adds a term of its own can't be accumulated then.
      average: of a loss that learns from the moving average; None for others.
      make_watch: makes a function (updates done, metrics of the last) -> warnings, of a loss whose
        metrics tell that nothing is learned; it may raise UserError, which ends the run.
    """

    prepare: Callable[[Flat, Flat, Any, View, jax.Array], View]
    forward: Callable[..., tuple[Outputs, Any]]
    criterion: Callable[[Flat, Outputs, View], tuple[jax.Array, Metrics]]
    counted: str = ""
    average: Average | None = None
    make_watch: Callable[[], Callable[[int, Mapping[str, float]], list[str]]] | None = None


def make_loss(objective: Objective) -> LossFn:
    """The loss function of a training step (see steps.LossFn)."""

    def loss_fn(trainable, frozen, model_state, batch, key):
        prepare_key, forward_key = jax.random.split(key)
        # Not the view's: whoever perturbs the batch may ask for that gradient.
        held = jax.lax.stop_gradient(trainable)
        view = objective.prepare(held, frozen, model_state, batch, prepare_key)
        outputs, model_state = objective.forward(
            trainable, frozen, model_state, view, forward_key, train=True
        )
        losses, metrics = objective.criterion(trainable, outputs, view)
        return losses.mean(), (model_state, metrics)

    return loss_fn


def forward_keys(key: jax.Array) -> dict[str, jax.Array]:
    """The keys of what is random inside a model in training."""
    dropout_key, adapter_key = jax.random.split(key)
    return {"dropout": dropout_key, "adapter": adapter_key}


def zero_after(*arrays: jax.Array) -> jax.Array:
    """f32[] 0, known only once all of the arrays are; NaN where they are not finite."""
    return 0 * sum((x.astype(jnp.float32).sum() for x in arrays), jnp.zeros((), jnp.float32))


def after(zero: jax.Array, array: jax.Array) -> jax.Array:
    """The array, bit-identical, but not before `zero` is there.

    Passes that don't depend on each other, such as a teacher's and its student's, may be compiled
    to run side by side, and then need the memory of both. A barrier would order them too, but XLA's
    CPU compiler forgets barriers before it decides.
    """
    return array + zero.astype(array.dtype)
