"""AutoAttack: four attacks in turn on whatever still stands (Croce & Hein 2020, sections 6 and A).

The protocol is the published code's, version by version. Of each attack one function is jitted; its
size of batch is a power of two, so that it is compiled a few times however many examples stand.
Between attacks (targets, restarts, every few hundred queries) the host drops those that fell.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vision_jax import machine, sharding
from vision_jax.attacks import losses, norms
from vision_jax.attacks.apgd import apgd
from vision_jax.attacks.examples import keys_of
from vision_jax.attacks.fab import fab
from vision_jax.attacks.norms import Norm
from vision_jax.attacks.square import square
from vision_jax.errors import UserError

Array = jax.Array
Version = Literal["standard", "plus", "rand"]
# (arguments, images f[B, H, W, C]) -> logits f[B, C]; of "rand" (arguments, images, keys key[B])
LogitsFn = Callable[..., Array]
# (name of the attack, which of its rounds, how many rounds, share that stands)
Report = Callable[[str, int, int, float], None]

STEPS = 100
QUERIES = 5000
QUERIES_A_CALL = 250
EXPECTATION = 20  # draws of a model of "rand"

# (attack, rounds); a round of a targeted attack is a target, from the runner-up on, else a restart
_PLUS = (
    *(("apgd-ce", 5), ("apgd-dlr", 5), ("fab", 5), ("square", 1), ("apgd-t", 9), ("fab-t", 9)),
)
PROTOCOLS: Mapping[tuple[Version, Norm], tuple[tuple[str, int], ...]] = {
    ("standard", "linf"): (("apgd-ce", 1), ("apgd-t", 9), ("fab-t", 9), ("square", 1)),
    ("standard", "l2"): (("apgd-ce", 1), ("apgd-t", 9), ("fab-t", 9), ("square", 1)),
    ("standard", "l1"): (("apgd-ce", 5), ("apgd-t", 5), ("fab-t", 9), ("square", 1)),
    ("plus", "linf"): _PLUS,
    ("plus", "l2"): _PLUS,
    ("rand", "linf"): (("apgd-ce", 1), ("apgd-dlr", 1)),
    ("rand", "l2"): (("apgd-ce", 1), ("apgd-dlr", 1)),
}


@dataclass(frozen=True)
class Verdicts:
    """What AutoAttack found, for N examples in their order.

    Attributes:
      images: f[N, H, W, C]; of an example that stands, and of one that was wrong from the start,
        the image itself.
      robust: bool[N].
      fell_to: "clean" for an example that was wrong from the start, the attack's name, or "".
      accuracy: {"clean" or the attack's name: share that stood after it}, in order.
    """

    images: np.ndarray
    robust: np.ndarray
    fell_to: tuple[str, ...]
    accuracy: dict[str, float]


def autoattack(
    logits_fn: LogitsFn,
    arguments: Any,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    epsilon: float,
    norm: Norm = "linf",
    version: Version = "standard",
    attacks: tuple[str, ...] | None = None,
    batch_size: int = 256,
    mesh: Mesh | None = None,
    index: np.ndarray | None = None,
    seed: int = 0,
    queries: int = QUERIES,
    steps: int = STEPS,
    report: Report | None = None,
) -> Verdicts:
    """Accuracy under the worst of several attacks, example by example.

    Results depend on the seed and each example's index, and on no batch size or number of devices
    but by the rounding of the model itself.

    Args:
      logits_fn: (arguments, images) -> logits, pure and deterministic: BatchNorm with its running
        statistics, no dropout. Of a model that draws, with version "rand", (arguments, images,
        keys) with a key an example.
      arguments: a pytree, its parameters; placed by the caller, an input of what is compiled.
      images: f[N, H, W, C] in [0, 1], on the host.
      labels: int[N].
      epsilon: the radius, in units of the pixels.
      norm: "linf", "l2" or "l1" ("l1" has the standard version only).
      version: "standard"; "plus", with more restarts and untargeted attacks; "rand".
      attacks: the protocol's that are to run, by name; None for all.
      batch_size: of a call at most; rounded up to a power of two.
      mesh: over which batches are split; None for one over all devices.
      index: int[N], of the examples in their data set; None for 0, 1, ...
      seed: of all that is drawn.
      queries: of Square, as published 5000; fewer only to try things out.
      steps: of the others, as published 100.
      report: called after each round.

    Raises:
      UserError: a version without such a norm; an unknown attack; fewer than 4 classes.
    """
    protocol = _protocol(version, norm, attacks)
    mesh = sharding.make_mesh(-1, 1) if mesh is None else mesh
    images, labels = np.asarray(images), np.asarray(labels, np.int32)
    images = images.astype(np.promote_types(images.dtype, np.float32), copy=False)
    index = np.arange(len(images), dtype=np.int32) if index is None else np.asarray(index, np.int32)
    over = partial(
        _run_in_batches,
        arguments,
        images,
        labels,
        index,
        mesh,
        epsilon=epsilon,
        seed=seed,
        batch_size=batch_size,
    )
    functions = _functions(logits_fn, norm, version, steps, sharding.replicated(mesh))
    rows = np.arange(len(images))
    fooled, classes = over(functions["clean"], rows, 0, extra={})
    robust, adversarial = ~fooled, images.copy()
    fell_to = np.where(fooled, "clean", "").astype(object)
    accuracy = {"clean": float(robust.mean())}

    def settle(name: str, rows: np.ndarray, found: np.ndarray, fooled: np.ndarray) -> None:
        adversarial[rows[fooled]], fell_to[rows[fooled]] = found[fooled], name
        robust[rows[fooled]] = False

    for salt, (name, rounds) in enumerate(protocol, 1):
        if name.endswith("-t"):
            rounds = min(rounds, int(classes[0]) - 1)
        pieces = -(-queries // QUERIES_A_CALL) if name == "square" else rounds
        held: np.ndarray | None = None  # where Square is with each example that stands
        for number in range(pieces):
            rows = np.flatnonzero(robust)
            if len(rows) == 0:
                break
            # One stream of draws for all of Square, so that its pieces are one run.
            stream = 1000 * salt + (0 if name == "square" else number)
            if name == "square":
                first = number * QUERIES_A_CALL
                extra = {"first": first, "queries": min(QUERIES_A_CALL, queries - first)}
                function = functions["square" if number == 0 else "square on"]
                arrays = () if held is None else (held,)
                found, fooled = over(function, rows, stream, *arrays, extra=extra)
                held = found[~fooled]
            else:
                extra = {"rank": number + 2} if name.endswith("-t") else {}
                kind = "fab again" if name == "fab" and number else name
                found, fooled = over(functions[kind], rows, stream, extra=extra)
            settle(name, rows, found, fooled)
            if report is not None:
                report(name, number + 1, pieces, float(robust.mean()))
        accuracy[name] = float(robust.mean())
    return Verdicts(adversarial, robust, tuple(fell_to), accuracy)


def _run_in_batches(
    arguments: Any,
    images: np.ndarray,
    labels: np.ndarray,
    index: np.ndarray,
    mesh: Mesh,
    function: Callable[..., Any],
    rows: np.ndarray,
    salt: int,
    *arrays: Any,
    epsilon: float,
    seed: int,
    batch_size: int,
    extra: Mapping[str, Any],
) -> list[np.ndarray]:
    """The function's results for `rows`, batch by batch; `arrays` have an entry for each row.

    Batches are padded to few sizes, a power of two times the least, so that little is compiled.
    """
    smallest = max(8, mesh.size)
    if smallest % mesh.size or (smallest & (smallest - 1)):
        smallest = mesh.size  # a number of devices that is no power of two, times powers of two
    place = partial(sharding.place, sharding=sharding.batch_sharding(mesh))
    results = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        size = smallest
        while size < len(part):
            size *= 2
        padded = np.resize(part, size)
        own = [np.resize(a[first : first + batch_size], (size, *a.shape[1:])) for a in arrays]
        keys = _keys(place(index[padded]), seed, salt)
        outputs = function(
            arguments,
            place(images[padded]),
            place(labels[padded]),
            keys,
            epsilon,
            *[place(array) for array in own],
            **extra,
        )
        results.append([np.asarray(output)[: len(part)] for output in outputs])
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def _protocol(
    version: Version, norm: Norm, attacks: tuple[str, ...] | None
) -> tuple[tuple[str, int], ...]:
    if (version, norm) not in PROTOCOLS:
        known = ", ".join(f"{version} in {norm}" for version, norm in PROTOCOLS)
        raise UserError(f"autoattack: no version {version!r} in {norm!r}; there are {known}")
    protocol = PROTOCOLS[version, norm]
    if attacks is None:
        return protocol
    names = [name for name, _ in protocol]
    if unknown := [name for name in attacks if name not in names]:
        raise UserError(f"autoattack: {version} has no {unknown[0]!r}; it has {', '.join(names)}")
    return tuple(entry for entry in protocol if entry[0] in attacks)


@partial(jax.jit, static_argnums=(1, 2))
def _keys(index: Array, seed: int, salt: int) -> Array:
    """key[B] of examples' indices, a stream of its own for each salt."""
    key = jax.random.fold_in(jax.random.key(seed), salt)
    return keys_of(key, index)


def _functions(
    logits_fn: LogitsFn, norm: Norm, version: Version, steps: int, whole: Any
) -> dict[str, Callable[..., Any]]:
    """Jitted (arguments, images, labels, keys, epsilon, ...) -> (found images, fooled)."""
    expectation = EXPECTATION if version == "rand" else 0
    shrinking = norm == "l1"

    def bind(arguments: Any, keys: Array) -> Callable[[Array], Array]:
        if expectation:
            return lambda images: logits_fn(arguments, images, keys)
        return lambda images: logits_fn(arguments, images)

    def wrong(logits: Array, labels: Array) -> Array:
        return ~losses.predicts(logits, labels)

    def jitted(attack: Callable[..., Array], static: tuple[str, ...] = ()) -> Callable[..., Any]:
        def run(arguments, images, labels, keys, epsilon, *arrays, **extra):
            found = attack(arguments, images, labels, keys, epsilon, *arrays, **extra)
            again = jax.vmap(jax.random.fold_in, (0, None))(keys, 2**30)
            fooled = wrong(bind(arguments, again)(found), labels)
            return found, fooled

        return machine.jit(run, static_argnames=static, out_shardings=whole)

    def clean(arguments, images, labels, keys, epsilon):
        logits = bind(arguments, keys)(images)
        return wrong(logits, labels), jnp.full(len(labels), logits.shape[-1])

    def ranked(arguments: Any, images: Array, rank: Array) -> Array:
        """The class of that rank at the image, 1 the likeliest."""
        return jnp.take(jnp.argsort(logits_fn(arguments, images), axis=-1), -rank, axis=-1)

    def make_apgd(loss: losses.Loss) -> Callable[..., Array]:
        def attack(arguments, images, labels, keys, epsilon):
            def loss_of_images(images: Array, *own: Array) -> tuple[Array, Array]:
                logits = bind(arguments, *own or (keys,))
                return losses.make_untargeted(logits, labels, loss)(images)

            return apgd(
                loss_of_images,
                images,
                keys,
                epsilon=epsilon,
                norm=norm,
                steps=steps,
                expectation=expectation,
                shrinking=shrinking,
            )

        return attack

    def apgd_t(arguments, images, labels, keys, epsilon, *, rank):
        targets = ranked(arguments, images, rank)
        loss = losses.make_targeted_dlr(bind(arguments, keys), labels, targets)
        return apgd(
            loss, images, keys, epsilon=epsilon, norm=norm, steps=steps, shrinking=shrinking
        )

    def nearest(arguments, images, labels, keys, epsilon, *, rank=None, again=False):
        found = fab(
            bind(arguments, keys),
            images,
            labels,
            keys if again else None,
            epsilon=epsilon,
            norm=norm,
            steps=steps,
            targets=None if rank is None else ranked(arguments, images, rank),
        )
        inside = norms.size(found - images, norm) <= epsilon
        return jnp.where(inside, found, images)

    def search(arguments, images, labels, keys, epsilon, begun=None, *, first, queries):
        return square(
            bind(arguments, keys),
            images,
            labels,
            keys,
            epsilon=epsilon,
            norm=norm,
            queries=queries,
            first=first,
            begun=begun,
        )

    return {
        "clean": machine.jit(clean, out_shardings=whole),
        "apgd-ce": jitted(make_apgd(losses.cross_entropy)),
        "apgd-dlr": jitted(make_apgd(losses.dlr)),
        "apgd-t": jitted(apgd_t),
        "fab": jitted(nearest),
        "fab again": jitted(partial(nearest, again=True)),
        "fab-t": jitted(nearest),
        "square": jitted(search, ("queries",)),
        "square on": jitted(search, ("queries",)),
    }
