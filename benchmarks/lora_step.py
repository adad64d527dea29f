"""What a LoRA step costs beside full fine-tuning: FLOPs, residuals, optimizer state, and time.

    python -m benchmarks.lora_step                     # ViT-B/16, 224 px, batch 4; no arrays made
    python -m benchmarks.lora_step --time --peft       # and ms a step, beside torch's PEFT

Each step is the trainer's own (`steps.make_train_step`, AdamW). FLOPs are XLA's count for the
compiled step. Residuals are what the forward pass keeps for the backward pass, parameters aside.
"""

import argparse
import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vision_jax import objective, steps
from vision_jax.models import families
from vision_jax.models.vit import ViT, variant_arguments
from vision_jax.tasks.classification import objective as classification
from vision_jax.trees import lora, paths

RULES = (r"block_\d+/attn/qkv/kernel", r"block_\d+/mlp/fc\d/kernel")
TARGETS = ["qkv", "fc1", "fc2"]  # the same in timm's names
FORMS = ("full", "merged", "attached")


def make_problem(form: str, variant: str, depth: int | None, image_size: int, dtype):
    """(loss_fn, abstract trainable, abstract frozen) of one form of fine-tuning.

    full: every parameter trains. attached: rank-8 adapters on q, v, fc1 and fc2 and the head train,
    through structured leaves. merged: the same parameters, through plain kernels W + sAB that are
    computed inside the loss, with the gradient left to autodiff.
    """
    arguments = variant_arguments(variant) | ({"depth": depth} if depth else {})
    model = ViT(num_classes=10, image_size=(image_size, image_size), dtype=dtype, **arguments)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, image_size, image_size, 3)))[
        "params"
    ]
    if form != "full":
        like = jax.eval_shape(
            lambda params: lora.attach(
                params, RULES, key=jax.random.key(0), rank=8, alpha=16, qkv_parts="q,v"
            ),
            like,
        )
    flat = paths.flatten(like)
    head = {path for path in flat if path.startswith("head/")}
    chosen = set(flat) if form == "full" else head | lora.adapter_paths(like)
    trainable, frozen = paths.partition(flat, chosen)

    def assemble(flat):
        params = paths.unflatten(like, flat)
        return lora.merge(params) if form == "merged" else params

    loss_fn = objective.make_loss(
        classification.make_objective(families.make_apply(model), assemble, num_classes=10)
    )
    return loss_fn, trainable, frozen


def abstract_batch(batch_size: int, image_size: int):
    return {
        "image": jax.ShapeDtypeStruct((batch_size, image_size, image_size, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }


def compile_step(loss_fn, trainable, frozen, batch):
    """The compiled step and its abstract state."""
    tx = optax.adamw(1e-3)
    step = steps.make_train_step(loss_fn, tx, seed=0, schedule=lambda step: 1e-3)
    state = jax.eval_shape(lambda t: steps.make_state(t, {}, tx=tx, ema=False), trainable)
    return step.lower(state, frozen, batch).compile(), state


def residual_bytes(loss_fn, trainable, frozen, batch) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the parameters."""

    def pull(trainable, frozen, batch):
        return jax.vjp(
            lambda trainable: loss_fn(trainable, frozen, {}, batch, jax.random.key(0))[0],
            trainable,
        )[1]

    kept = jax.tree.leaves(jax.eval_shape(pull, trainable, frozen, batch))
    return bytes_of(kept) - bytes_of((trainable, frozen))


def bytes_of(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def milliseconds(run, repeats: int) -> float:
    """Median wall time of `run()`, after one call that does not count."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times)) * 1e3


def time_step(compiled, state, frozen, batch, repeats: int) -> float:
    random = np.random.default_rng(0)

    def fill(x):
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(random.normal(size=x.shape) * 0.02, x.dtype)

    held = [jax.tree.map(fill, state)]  # the step donates it, so there is never a second
    frozen, batch = jax.tree.map(fill, (frozen, batch))

    def run():
        state, metrics = compiled(held.pop(), frozen, batch)
        held.append(jax.block_until_ready((state, metrics))[0])

    return milliseconds(run, repeats)


def time_peft(variant: str, depth: int | None, image_size: int, batch_size: int, repeats: int):
    """(ms of torch's full fine-tuning step, ms of PEFT's LoRA step, rank 8 on fused qkv, fc1, fc2).

    PEFT has one adapter on timm's fused qkv where ours has one each on q and v.
    """
    import peft
    import timm
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    arguments = variant_arguments(variant)
    images = torch.rand(batch_size, 3, image_size, image_size)
    labels = torch.zeros(batch_size, dtype=torch.long)

    def measure(adapt):
        model = adapt(
            timm.models.VisionTransformer(
                img_size=image_size,
                patch_size=arguments["patch_size"],
                embed_dim=arguments["width"],
                depth=depth or arguments["depth"],
                num_heads=arguments["num_heads"],
                num_classes=10,
            )
        )
        optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad])

        def run():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        return milliseconds(run, repeats)

    config = peft.LoraConfig(r=8, target_modules=TARGETS, modules_to_save=["head"])
    return measure(lambda model: model), measure(lambda model: peft.get_peft_model(model, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="b/16")
    parser.add_argument("--depth", type=int, help="blocks, if not the variant's own")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--time", action="store_true", help="also run the steps")
    parser.add_argument("--peft", action="store_true", help="also time torch (needs the extra)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()

    platform = jax.default_backend()
    print(
        f"ViT {options.variant}, depth {options.depth or 'full'}, {options.image_size} px, batch "
        f"{options.batch}, {options.dtype}, {platform}, jax {jax.__version__}"
    )
    batch = abstract_batch(options.batch, options.image_size)
    full_flops = None
    for form in FORMS:
        problem = make_problem(
            form, options.variant, options.depth, options.image_size, options.dtype
        )
        compiled, state = compile_step(*problem, batch)
        flops = compiled.cost_analysis()["flops"]
        full_flops = full_flops or flops
        row = {
            "form": form,
            "gflops": round(flops / 1e9, 1),
            "of_full": round(flops / full_flops, 3),
            "residual_mb": round(residual_bytes(*problem, batch) / 1e6, 1),
            "temporary_mb": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
            "trainable_mb": round(bytes_of(problem[1]) / 1e6, 1),
            "optimizer_mb": round(bytes_of(state.opt_state) / 1e6, 1),
        }
        if options.time:
            row["ms"] = round(time_step(compiled, state, problem[2], batch, options.repeats), 1)
        print(json.dumps(row), flush=True)
    if options.peft:
        full, adapted = time_peft(
            options.variant, options.depth, options.image_size, options.batch, options.repeats
        )
        print(json.dumps({"torch_full_ms": round(full, 1), "torch_peft_ms": round(adapted, 1)}))


if __name__ == "__main__":
    main()
