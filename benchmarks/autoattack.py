"""AutoAttack beside PyTorch's on the same weights: accuracy after each attack, verdicts and time.

    python -m benchmarks.autoattack                       # beside torchattacks
    python -m benchmarks.autoattack --reference FOLDER    # beside the published code in FOLDER

Two small models are trained here on the embedded Fashion-MNIST, pooled to 12 x 12 pixels, a ResNet
on clean images and a ViT on PGD's, and go to timm's by our converter. Both programs then attack the
same images by the standard protocol. Their draws differ, and the published code draws one square
for its whole batch and ours one an example, so that single verdicts may differ.
"""

import argparse
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timm
import torch

from vision_jax.attacks import losses
from vision_jax.attacks.autoattack import autoattack
from vision_jax.attacks.gradient import pgd
from vision_jax.convert import arguments_of, export_weights
from vision_jax.data.sources import read_source
from vision_jax.models.resnet import ResNet
from vision_jax.models.vit import ViT
from vision_jax.trees import paths

SIDE = 12
RESNET = {"depths": (1, 1, 1, 1), "widths": (16, 32, 48, 64)}
VIT = {"width": 48, "depth": 2, "num_heads": 3, "mlp_width": 96, "patch_size": 3}
# The radius trained against, and the one attacked with
EPSILONS = {"resnet": (0.0, 0.05), "vit": (0.08, 0.08)}
NORMS = {"linf": "Linf", "l2": "L2"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def read(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images f32[N, 12, 12, 3] in [0, 1], labels i32[N]); means of 2 x 2 pixels, margins cut."""
    source = read_source(f"embedded:fashion_mnist/{split}")
    images = np.stack([np.asarray(source[i]["image"]) for i in range(len(source))])
    images = images.reshape(len(images), 28, 28, -1)[:, 2:-2, 2:-2, :1].astype(np.float32) / 255
    images = images.reshape(len(images), SIDE, 2, SIDE, 2, 1).mean((2, 4))
    return np.broadcast_to(images, (*images.shape[:3], 3)).copy(), source.labels


def make_model(name: str):
    if name == "resnet":
        return ResNet(num_classes=10, block="basic", **RESNET)
    return ViT(num_classes=10, image_size=(SIDE, SIDE), pool="avg", class_token=False,
               norm_after_pool=True, position_prefix=0, **VIT)  # fmt: skip


def make_reference(name: str, model, variables) -> torch.nn.Module:
    """timm's module with the same weights, its normalization in front."""
    flat = {}
    for tree in variables.values():
        flat |= {path: np.asarray(leaf) for path, leaf in paths.flatten(tree).items()}
    tensors, _ = export_weights(flat, name, arguments_of(model))
    if name == "resnet":
        module = timm.models.resnet.ResNet(
            timm.models.resnet.BasicBlock, RESNET["depths"], num_classes=10,
            channels=RESNET["widths"],
        )  # fmt: skip
    else:
        module = timm.models.VisionTransformer(
            img_size=SIDE, patch_size=VIT["patch_size"], num_classes=10, embed_dim=VIT["width"],
            depth=VIT["depth"], num_heads=VIT["num_heads"], mlp_ratio=2, global_pool="avg",
            class_token=False,
        )  # fmt: skip
    tensors = {key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}
    missing, extra = module.load_state_dict(tensors, strict=False)
    unexplained = [key for key in missing if not key.endswith("num_batches_tracked")]
    assert not unexplained + extra, (unexplained, extra)

    class Normalized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module
            self.mean, self.std = (
                torch.tensor(value, device=DEVICE).reshape(1, 3, 1, 1)
                for value in (model.mean, model.std)
            )

        def forward(self, images):
            return self.module((images - self.mean) / self.std)

    return Normalized().eval().requires_grad_(False).to(DEVICE)


def train(model, images, labels, *, epsilon: float, steps: int, seed: int = 0):
    """Variables after AdamW on clean images, or on PGD's where epsilon is above 0."""
    variables = model.init(jax.random.key(seed), jnp.zeros((1, SIDE, SIDE, 3)))
    params, state = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    tx = optax.adamw(optax.cosine_onecycle_schedule(steps, 3e-3), weight_decay=0.01)

    @jax.jit
    def step(params, state, moments, images, labels, keys):
        if epsilon:
            logits = partial(model.apply, {"params": params, **state})
            loss = losses.make_untargeted(lambda x: logits(x, train=False), labels)
            images = pgd(loss, images, keys, epsilon=epsilon, step_size=epsilon / 2, steps=4)

        def loss_fn(params):
            logits, new_state = model.apply(
                {"params": params, **state}, images, train=True, mutable=list(state)
            )
            return losses.cross_entropy(logits, labels).mean(), new_state

        gradient, new_state = jax.grad(loss_fn, has_aux=True)(params)
        updates, moments = tx.update(gradient, moments, params)
        return optax.apply_updates(params, updates), new_state, moments

    rng, moments = np.random.default_rng(seed), tx.init(params)
    for number in range(steps):
        rows = rng.integers(len(images), size=64)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), 64)
        params, state, moments = step(params, state, moments, images[rows], labels[rows], keys)
    return {"params": params, **state}


# A torch attack's result: (accuracy after each attack, robust bool[N])
Result = tuple[dict[str, float], np.ndarray]


def run_published(folder, module, images, labels, epsilon, norm, batch_size, seed) -> Result:
    sys.path.insert(0, folder)
    from autoattack import AutoAttack

    attack = AutoAttack(
        module,
        norm=NORMS[norm],
        eps=epsilon,
        version="standard",
        verbose=True,
        seed=seed,
        device=DEVICE,
    )
    accuracy = {}

    def log(line: str) -> None:
        if line.startswith(("initial accuracy", "robust accuracy after")):
            name, share = line.removeprefix("robust accuracy after ").split(":")
            name = "clean" if name == "initial accuracy" else name.lower()
            accuracy[name] = float(share.split("%")[0]) / 100
            print(f"  {line}", flush=True)

    attack.logger.log = log
    _, predicted = attack.run_standard_evaluation(images, labels, bs=batch_size, return_labels=True)
    return accuracy, (predicted == labels).cpu().numpy()


def run_torchattacks(module, images, labels, epsilon, norm, batch_size, seed) -> Result:
    """Its four attacks in turn with the protocol's settings: its own AutoAttack makes 10 steps."""
    import torchattacks as ta

    common = {"eps": epsilon, "norm": NORMS[norm], "seed": seed}
    attacks = {
        "apgd-ce": ta.APGD(module, **common, steps=100, loss="ce"),
        "apgd-t": ta.APGDT(module, **common, steps=100, n_classes=10),
        "fab-t": ta.FAB(module, **common, steps=100, multi_targeted=True, n_classes=10),
        "square": ta.Square(module, **common, n_queries=5000, resc_schedule=False),
    }
    robust = predict(module, images) == labels.cpu().numpy()
    accuracy = {"clean": float(robust.mean())}
    for name, attack in attacks.items():
        rows = np.flatnonzero(robust)
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            found = attack(images[part], labels[part]).detach()
            robust[part] = predict(module, found) == labels[part].cpu().numpy()
        accuracy[name] = float(robust.mean())
        print(f"  {name} {accuracy[name]:.2%}", flush=True)
    return accuracy, robust


def predict(module, images) -> np.ndarray:
    with torch.no_grad():
        return module(images).argmax(1).cpu().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", help="folder that holds the published `autoattack` package")
    parser.add_argument("--models", nargs="+", default=["resnet", "vit"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epsilon", type=float, help="in place of each model's own")
    parser.add_argument("--norm", default="linf", choices=NORMS)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0, help="of both programs' draws")
    parser.add_argument("--steps", type=int, default=300, help="of training")
    options = parser.parse_args()
    print(f"JAX on {jax.devices()[0]}, PyTorch on {DEVICE}", flush=True)
    images, labels = read("train")
    test_images, test_labels = read("test")
    test_images, test_labels = test_images[: options.images], test_labels[: options.images]
    tensors = torch.from_numpy(test_images).permute(0, 3, 1, 2).contiguous().to(DEVICE)
    targets = torch.from_numpy(test_labels).long().to(DEVICE)
    for name in options.models:
        model = make_model(name)
        train_epsilon, epsilon = EPSILONS[name]
        epsilon = options.epsilon or epsilon
        variables = train(model, images, labels, epsilon=train_epsilon, steps=options.steps)
        module = make_reference(name, model, variables)
        print(f"{name}: {len(test_images)} images, {options.norm} {epsilon}", flush=True)

        def logits_fn(variables, images, model=model):
            return model.apply(variables, images, train=False)

        wall, cpu = time.time(), time.process_time()
        ours = autoattack(
            logits_fn,
            variables,
            test_images,
            test_labels,
            epsilon=epsilon,
            norm=options.norm,
            batch_size=options.batch,
            seed=options.seed,
            report=lambda name, number, of, standing: print(
                f"  {name} {number}/{of} {standing:.2%}", flush=True
            ),
        )
        wall, cpu = time.time() - wall, time.process_time() - cpu
        their_wall, their_cpu = time.time(), time.process_time()
        arguments = (module, tensors, targets, epsilon, options.norm, options.batch, options.seed)
        if options.reference:
            accuracy, robust = run_published(options.reference, *arguments)
        else:
            accuracy, robust = run_torchattacks(*arguments)
        their_wall, their_cpu = time.time() - their_wall, time.process_time() - their_cpu
        print("after     ours    theirs")
        for attack, share in accuracy.items():
            print(f"{attack:8} {ours.accuracy.get(attack, 0):7.2%} {share:7.2%}")
        only_ours, only_theirs = (ours.robust & ~robust).sum(), (~ours.robust & robust).sum()
        print(f"robust in ours alone {only_ours}, in theirs alone {only_theirs}, of {len(robust)}")
        count = len(test_images)
        print(
            f"ms an image, compilation included: ours {1e3 * wall / count:.0f} wall,"
            f" {1e3 * cpu / count:.0f} of the CPU; theirs {1e3 * their_wall / count:.0f} and"
            f" {1e3 * their_cpu / count:.0f}; ratio {their_wall / wall:.2f} wall,"
            f" {their_cpu / cpu:.2f} CPU",
            flush=True,
        )


if __name__ == "__main__":
    main()
