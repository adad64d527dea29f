"""Attacks on identical weights and batches: this package beside torchattacks and foolbox.

    pip install -e '.[parity]' && pip install --no-deps torchattacks==3.5.1
    python -m benchmarks.attacks            # PGD-20 and C&W; minutes on two cores
    python -m benchmarks.attacks --large    # ResNet-50 and ViT-B/16 at 224 px, for a GPU

A ResNet and a ViT come from timm with random weights and go through our converter. All three get
the same float32 images, labels and, for PGD, the same start: the images themselves. On a GPU all
three multiply in TF32. Wall and CPU time per image, compiled before, are each the best of three,
the three in turn; where other programs run beside it, CPU time is the one to read. torchattacks'
C&W has no search for its constant, so ours and foolbox's are given one too.

The last lines say why: the time of what an attack can't do without, a forward pass and an input
gradient of the cross-entropy for each step, by JAX and by PyTorch alone, without an attack.
"""

import argparse
import tempfile
import time
from pathlib import Path

import foolbox
import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchattacks

from vision_jax import convert
from vision_jax.attacks import gradient, losses
from vision_jax.attacks.carlini_wagner import carlini_wagner
from vision_jax.certify.random_weights import randomize, randomize_statistics, sample_images
from vision_jax.certify.references import make_reference
from vision_jax.models.families import build_model
from vision_jax.trees import paths

SMALL = {
    "ResNet, 32 px": ("resnet18", {"layers": (2, 2, 2, 2), "channels": (16, 32, 64, 128)}, 32),
    "ViT, 64 px": (
        "vit_tiny_patch16_224",
        {"embed_dim": 96, "depth": 4, "num_heads": 3, "img_size": 64, "patch_size": 8},
        64,
    ),
}
LARGE = {
    "ResNet-50": ("resnet50", {}, 224),
    "ViT-B/16": ("vit_base_patch16_224", {}, 224),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Normalized(torch.nn.Module):
    """The reference on images in [0, 1]."""

    def __init__(self, module, arguments):
        super().__init__()
        self.module = module
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(arguments[name]).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.module((images - self.mean) / self.std)


def make_models(build, given, size):
    """(logits_of_images, the peers' model), of the same random weights."""
    reference = make_reference("timm", build, {"num_classes": 10, **given})
    randomize(reference.module, 0)
    randomize_statistics(reference, (size, size), 3, 0)
    with tempfile.TemporaryDirectory() as folder:
        weights = convert.read_weights(reference.save(Path(folder)))
        family, arguments = convert.recognize(weights)
        model = build_model(family, **arguments)
        like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
        target = {path: x for tree in like.values() for path, x in paths.flatten(tree).items()}
        flat = convert.import_weights(weights, target, arguments)
        flat = {path: np.array(x) for path, x in flat.items()}
    variables = {
        name: paths.unflatten(tree, {path: flat[path] for path in paths.flatten(tree)})
        for name, tree in like.items()
    }
    return lambda images: model.apply(variables, images), Normalized(
        reference.module, arguments
    ).to(DEVICE)


def make_attacks(logits_of_images, peer, labels, flags):
    """{attack: {library: function from images}}; ours takes and gives NHWC, theirs NCHW."""
    ce = losses.make_untargeted(logits_of_images, jnp.asarray(labels))
    margin = losses.make_untargeted(logits_of_images, jnp.asarray(labels), losses.margin)
    wrapped = foolbox.PyTorchModel(peer, bounds=(0, 1), device=DEVICE)
    y = torch.from_numpy(labels).to(DEVICE)
    epsilon, step_size, weight, rate = 4 / 255, 1 / 255, 1.0, 0.01
    pgd = torchattacks.PGD(peer, epsilon, step_size, flags.steps, random_start=False)
    cw = torchattacks.CW(peer, c=weight, steps=flags.cw_steps, lr=rate)
    their_pgd = foolbox.attacks.LinfPGD(
        abs_stepsize=step_size, steps=flags.steps, random_start=False
    )
    their_cw = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=1,
        steps=flags.cw_steps,
        stepsize=rate,
        initial_const=weight,
        abort_early=False,
    )
    arguments = {"epsilon": epsilon, "step_size": step_size, "steps": flags.steps}
    search = {"steps": flags.cw_steps, "searches": 1, "learning_rate": rate, "weight": weight}
    return {
        f"PGD-{flags.steps}": {
            "vision_jax": jax.jit(
                lambda x: gradient.pgd(ce, x, None, random_start=False, **arguments)
            ),
            "torchattacks": lambda x: pgd(x, y),
            "foolbox": lambda x: their_pgd.run(wrapped, x, y, epsilon=epsilon),
        },
        f"C&W, {flags.cw_steps} steps": {
            "vision_jax": jax.jit(lambda x: carlini_wagner(margin, x, **search)),
            "torchattacks": lambda x: cw(x, y),
            "foolbox": lambda x: their_cw.run(wrapped, x, y),
        },
    }


def make_passes(logits_of_images, peer, labels, steps):
    """{library: function from images}: as many forward passes and input gradients as steps."""
    ce = losses.make_untargeted(logits_of_images, jnp.asarray(labels))
    y = torch.from_numpy(labels).to(DEVICE)

    def ours(images):
        gradient_of = jax.grad(lambda x: ce(x)[0].sum())
        # A gradient of the last one's result, so that none is left out
        return jax.lax.fori_loop(0, steps, lambda _, x: x - 1e-9 * gradient_of(x), images)

    def theirs(images):
        for _ in range(steps):
            images = images.detach().requires_grad_()
            loss = torch.nn.functional.cross_entropy(peer(images), y, reduction="sum")
            images = images - 1e-9 * torch.autograd.grad(loss, images)[0]
        return images

    return {"JAX": jax.jit(ours), "PyTorch": theirs}


def take_times(runs, ours, theirs):
    """({name: (wall, CPU) seconds, each the best of three}, {name: the images found})."""
    seconds = {name: np.full(2, np.inf) for name in runs}
    found = {}
    for attempt in range(4):  # the first compiles
        for name, run in runs.items():
            start = np.array([time.perf_counter(), time.process_time()])
            if name in ("vision_jax", "JAX"):
                found[name] = np.asarray(run(ours))
            else:
                found[name] = run(theirs).detach().cpu().numpy().transpose(0, 2, 3, 1)
            taken = np.array([time.perf_counter(), time.process_time()]) - start
            if attempt:
                seconds[name] = np.minimum(seconds[name], taken)
    return seconds, found


def main() -> None:
    """Prints seconds an image, how much faster ours is, and on how many verdicts they differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cw_steps", type=int, default=50)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--models", nargs="+", help="whose names begin so; all by default")
    parser.add_argument("--only", default="", help="attacks whose name has this")
    flags = parser.parse_args()
    torch.set_float32_matmul_precision("high")  # TF32, as JAX has it
    torch.backends.cudnn.benchmark = True
    print(f"{flags.images} images, {torch.get_num_threads()} torch threads, {jax.devices()[0]}")
    for name, (build, given, size) in (LARGE if flags.large else SMALL).items():
        if flags.models and not name.startswith(tuple(flags.models)):
            continue
        logits_of_images, peer = make_models(build, given, size)
        images = sample_images(flags.images, (size, size), 3, 1).astype(np.float32)
        ours = jnp.asarray(images)
        theirs = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(DEVICE)
        logits = jax.jit(logits_of_images)
        labels = np.asarray(logits(ours)).argmax(1).astype(np.int64)

        def show(what, library, taken, first, name=name):
            wall, cpu = taken / flags.images * 1e3
            ratio = " and ".join(f"{x:.2f}" for x in taken / first)
            print(
                f"{name:14}{what:15}{library:13}{wall:7.2f} ms an image, CPU {cpu:7.2f}: {ratio}",
                end="",
            )

        attacks = make_attacks(logits_of_images, peer, labels, flags)
        for attack, runs in attacks.items():
            if flags.only not in attack:
                continue
            seconds, found = take_times(runs, ours, theirs)
            fooled = {k: np.asarray(logits(x)).argmax(1) != labels for k, x in found.items()}
            for library, taken in seconds.items():
                show(attack, library, taken, seconds["vision_jax"])
                differ = int((fooled[library] != fooled["vision_jax"]).sum())
                print(
                    f" x ours; fooled {fooled[library].mean():.3f}, {differ} verdicts differ",
                    flush=True,
                )
        passes = make_passes(logits_of_images, peer, labels, flags.steps)
        seconds, _ = take_times(passes, ours, theirs)
        for library, taken in seconds.items():
            show(f"{flags.steps} passes", library, taken, seconds["JAX"])
            print(" x JAX", flush=True)


if __name__ == "__main__":
    main()
