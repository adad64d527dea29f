"""What a LoRA step costs beside full fine-tuning: FLOPs, residuals, optimizer state.

    python -m benchmarks.lora_step                     # ViT-B/16, 224 px, batch 4; no arrays made

`python -m benchmarks.training --jobs LoRA` has the times, beside timm with PEFT.

Each step is the trainer's own (`steps.make_train_step`, AdamW). FLOPs are XLA's count for the
compiled step. Residuals are what the forward pass keeps for the backward pass, parameters aside.
"""

import argparse
import json

import jax
import jax.numpy as jnp
import optax

from vision_jax import objective, steps
from vision_jax.models import families
from vision_jax.models.vit import ViT, variant_arguments
from vision_jax.tasks.classification import objective as classification
from vision_jax.trees import lora, paths

RULES = (r"block_\d+/attn/qkv/kernel", r"block_\d+/mlp/fc\d/kernel")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", default="b/16")
    parser.add_argument("--depth", type=int, help="blocks, if not the variant's own")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
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
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
