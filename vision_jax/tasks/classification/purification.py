"""A generator before a classifier: noise over an image, and the way back to an image without it.

DiffPure's idea (Nie et al. 2022, https://arxiv.org/abs/2205.07460) with a flow: what an attack has
added may drown in the noise, and what is drawn back is an image as the generator knows them. The
noise is new in each draw, so an attacker who knows everything still has to average over it. What is
measured is three attacks' success beside each other:

  - none: what the defence costs where nobody attacks;
  - transferred: adversarial examples of the classifier alone, which knows nothing of the defence;
  - adaptive: the gradient through the whole of it, averaged over draws of the noise (Athalye et al.
    2018, https://arxiv.org/abs/1802.00420). This one alone says how robust it is.

All draws are by (attack, place of the image in the data, number of the draw); those that an attack
averages over are others than those by which it is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vision_jax.attacks import norms
from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.norms import Norm
from vision_jax.errors import UserError
from vision_jax.ops import flow
from vision_jax.ops.noise import normal
from vision_jax.tasks.api import Trained
from vision_jax.tasks.classification import under_attack as robust

Array = jax.Array
# (variables, images f[B, H, W, C] in [0, 1], keys[B]) -> images
Purify = Callable[[Any, Array, Array], Array]

JUDGED_BY = 3  # draws of the noise


@dataclass(frozen=True)
class Settings:
    """How images are purified: a config's fields robustness.purify*.

    Attributes:
      folder: of the run whose generator does it, "" for none.
      strength: share of the way to noise, 0 to 1; 0 leaves images as they are.
      steps: of the way back.
      draws: of the noise, that an adaptive attack averages over.
    """

    folder: str
    strength: float
    steps: int
    draws: int


def check_generator(generator: Trained, trained: Trained, folder: str) -> None:
    """Raises UserError: no generator, or one of other images than the classifier's."""
    model = generator.model
    if getattr(model, "predicts", "") not in ("velocity", "image"):
        raise UserError(
            f"config.robustness.purify: {folder} is no run of config.task generation that learned "
            "a flow: name one"
        )
    made = (*model.image_size, model.in_channels)
    seen = (*trained.preprocessing.image_size, len(trained.preprocessing.mean))
    if made != seen:
        raise UserError(
            f"config.robustness.purify: {folder} makes images of {made[0]} x {made[1]} and "
            f"{made[2]} channels, and the classifier takes {seen[0]} x {seen[1]} and {seen[2]}: "
            "train one of the two with the other's config.model.image_size"
        )


def make_purify(generator: Trained, *, strength: float, steps: int) -> Purify:
    """The defence; its variables are `generator.arguments`.

    Images become strength parts of noise, as the generator's flow mixes them, and follow it back in
    Euler's steps, of no class. Gradients are computed again step by step (`jax.checkpoint`), so
    that memory doesn't grow with what the generator keeps of a step.
    """
    if strength == 0:
        return lambda variables, images, keys: images
    model, start = generator.model, 1 - strength
    times = flow.even_times(steps, start=start)

    def purify(variables: Any, images: Array, keys: Array) -> Array:
        trainable, frozen, state = variables
        params = generator.assemble({**trainable, **frozen})
        none = jnp.full((len(images),), model.num_classes, jnp.int32)

        @jax.checkpoint
        def velocity(x: Array, time: Array) -> Array:
            given = (x, jnp.full((len(x),), time), none)
            outputs, _ = generator.apply(params, state, *given, train=False, keys={})
            return flow.as_velocity(outputs["prediction"], x, time, model.predicts)

        noise = normal(keys, images.shape[1:])
        x = flow.mix(2 * images - 1, noise, jnp.asarray(start, images.dtype))
        return jnp.clip((flow.integrate(velocity, x, times, "euler") + 1) / 2, 0, 1)

    return purify


def make_defended(
    classifier: robust.Classifier, purify: Purify, variables: Any
) -> robust.Classifier:
    """The classifier whose logits of (images, keys) are behind the defence, of images before it."""

    def logits_fn(*given: Any) -> Array:
        *arguments, variables, images, keys = given
        seen = images if keys is None else purify(variables, images, keys)
        return classifier.logits_fn(*arguments, seen)

    return replace(classifier, logits_fn=logits_fn, arguments=(*classifier.arguments, variables))


def make_attacked(
    defended: robust.Classifier,
    purify: Purify,
    attack: robust.Attack | None,
    *,
    number: int,
    draws: int,
    seed: int,
) -> Callable[..., robust.Outputs]:
    """A function (examples, epsilon) -> what the classifier is shown under an attack, purified.

    "transferred" and "adaptive" f32[N, JUDGED_BY, H, W, C]; of no attack "none" alone.

    Args:
      number: of the attack, of which its draws are.
      draws: that the adaptive attack averages logits over.
      seed: of all of them.
    """
    root = jax.random.fold_in(jax.random.key(seed), number)

    def probe(run: Any, images: Array, labels: Array, index: Array, epsilon: Array) -> Any:
        own = keys_of(root, index)

        def noise_keys(kind: int, draw: Array) -> Array:
            return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(key, kind), draw))(
                own
            )

        def judged(seen: Array) -> Array:
            variables = run.args[-1]

            def draw(number: Array) -> Array:
                return purify(variables, seen, noise_keys(2, number))

            return jax.lax.map(draw, jnp.arange(JUDGED_BY)).swapaxes(0, 1)

        if attack is None:
            return {"none": judged(images)}

        def averaged(x: Array) -> Array:
            def add(total: Array, draw: Array) -> tuple[Array, None]:
                return total + run(x, noise_keys(1, draw)), None

            shape = jax.eval_shape(run, x, own)
            zeros = jnp.zeros(shape.shape, shape.dtype)
            return jax.lax.scan(add, zeros, jnp.arange(draws))[0] / draws

        def plain(x: Array) -> Array:
            return run(x, None)

        return {
            "transferred": judged(attack(plain, images, labels, own, epsilon)),
            "adaptive": judged(attack(averaged, images, labels, own, epsilon)),
        }

    return robust.make_over(defended, probe)


def under_purification(
    classifier: robust.Classifier,
    classify: Callable[..., robust.Outputs],
    generator: Trained,
    settings: Settings,
    attacks: Mapping[str, robust.Attack],
    examples: robust.Examples,
    epsilons: Sequence[float],
    *,
    norm: Norm,
    seed: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Accuracy behind the defence: of no attack, of transferred and of adaptive ones.

    Args:
      classify: of the classifier alone (see under_attack.make_classify): purified images are
        judged by the same program as all others, so that of strength 0 the figures are the same.

    Returns:
      {"strength", "steps", "draws", "clean": accuracy, "attacks": {name: [{"epsilon",
      "transferred", "adaptive", "count"}]}}; accuracies are means over JUDGED_BY draws, of examples
      that are right under the draw without the attack, too.
    """
    purify = make_purify(generator, strength=settings.strength, steps=settings.steps)
    defended = make_defended(classifier, purify, generator.arguments)
    make = partial(make_attacked, defended, purify, draws=settings.draws, seed=seed)

    def right(over: Callable[..., robust.Outputs], epsilon: float) -> dict[str, np.ndarray]:
        """{kind: bool[N, JUDGED_BY]}, batch by batch: all images at once would fill memory."""
        parts: list[dict[str, np.ndarray]] = []
        for start in range(0, len(examples.labels), classifier.batch_size):
            rows = np.arange(start, min(start + classifier.batch_size, len(examples.labels)))
            some = examples.take(rows)
            found = over(some, epsilon)
            verdicts = {}
            for kind, images in found.items():
                columns = []
                for draw in range(JUDGED_BY):
                    seen = replace(some, images=images[:, draw])
                    logits = classify(seen, leave_out=("image",))["logits"]
                    columns.append(logits.argmax(-1) == some.labels)
                verdicts[kind] = np.stack(columns, axis=1)
            parts.append(verdicts)
        return {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}

    clean = right(make(None, number=0), 0.0)["none"]
    count = len(examples.labels)
    say(robust.line("purified", {"accuracy": clean.mean(), "count": count}))
    results: dict[str, list[dict[str, Any]]] = {}
    for number, (name, attack) in enumerate(attacks.items(), 1):
        over, results[name] = make(attack, number=number), []
        for epsilon in epsilons:
            found = right(over, epsilon)
            shares = {kind: float((clean & verdict).mean()) for kind, verdict in found.items()}
            results[name].append({"epsilon": epsilon, **shares, "count": count})
            for kind, share in shares.items():
                shown = f"{name} {norms.show_epsilon(epsilon, norm)} {kind}"
                say(robust.line(shown, {"accuracy": share, "count": count}))
    return {
        "generator": settings.folder,
        "strength": settings.strength,
        "steps": settings.steps,
        "draws": settings.draws,
        "judged_by": JUDGED_BY,
        "clean": float(clean.mean()),
        "attacks": results,
    }
