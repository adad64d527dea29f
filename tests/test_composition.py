"""Everything composes: what trains x attacks x teachers x average x accumulation x recomputation.

    pytest tests/test_composition.py --all                   all of it; a DETR takes minutes
    pytest tests/test_composition.py --all -m "not hours"    so many that each choice is made
    pytest tests/test_composition.py                         one cell

A cell is a config, run for a few steps: one compilation, finite, what is frozen unchanged to the
bit, FLOPs the sum of its passes, temporary memory at most a tenth above that of its attack or its
teacher alone, and that on 8 devices with all parameters sharded too, where the loss is the same (in
float32, of DETR in float64).
"""

import functools
import itertools

import detection_runs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import cost, objective, sharding
from vision_jax.models.families import DTYPES
from vision_jax.recipes.distillation import objective as distillation
from vision_jax.recipes.distillation import recipe

DEVICES = 8
BATCH = 32  # of a micro-batch, so that activations outweigh parameters, as they do in real runs
STEPS = 2  # of an attack
TRAINS = ("full", "linear", "lora", "dora", "qlora")
ADAPTERS = ("lora", "dora", "qlora")
ATTACKS = ("clean", "fgsm", "pgd", "trades")
TEACHERS = ("none", "logits", "features")
FAMILIES = ("vit", "resnet", "detr")
SWITCHES = tuple(itertools.product((False, True), repeat=3))  # average, accumulation, remat

VIT = {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "patch_size": 2}
RESNET = {"block": "basic", "depths": (1, 1), "widths": (8, 16), "stem_width": 8,
          "stem_size": 3, "stem_pool": False}  # fmt: skip
ADAPTED = {
    "vit": r"block_\d+/(attn/(qkv|proj)|mlp/fc\d)/kernel",
    "resnet": r"stage_\d/block_\d+/conv\d/kernel",
    "detr": r"(en|de)coder_\d+/.*/kernel",
}
HEAD = {"vit": "head/.*", "resnet": "head/.*", "detr": "(class_head|box_head)/.*"}
# Of student and teacher. A ResNet this small would spend a tenth of its memory on patches to match.
LAYERS = {
    "vit": ("block_1", "stage_1"),
    "resnet": ("pooled", "pooled"),
    "detr": ("stage_1", "stage_1"),
}
TAUGHT_BY = {"vit": "resnet", "resnet": "vit", "detr": "detr"}


def every_cell():
    """(family, what trains, attack, teacher, switches), the switches by what trains of a family.

    So the step with the attack or the teacher alone is a cell too.
    """
    found = []
    for number, (family, trains) in enumerate(itertools.product(FAMILIES, TRAINS)):
        for attack, teacher in itertools.product(ATTACKS, TEACHERS):
            if (family, attack) != ("detr", "trades"):  # refused: it is for classifiers
                found.append((family, trains, attack, teacher, SWITCHES[(5 * number + 3) % 8]))
    return found


def covered(cell):
    """Its choices."""
    return {*cell[:4], *enumerate(cell[4])}


def few_cells():
    """So many of them that each choice is made; without DETR, whose cells take minutes."""
    cells = [cell for cell in every_cell() if cell[0] != "detr"]
    missing, chosen = set().union(*map(covered, cells)), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(covered(cell) & missing)))
        missing -= covered(chosen[-1])
    return chosen


def prepare(cell, devices):
    """The run of a cell, all parameters sharded if there are several devices."""
    family, trains, attack, teacher, (average, accumulation, remat) = cell
    recipes = [
        *(["quantize"] if trains == "qlora" else []),
        *(["lora"] if trains in ADAPTERS else []),
        *(["distill"] if teacher != "none" else []),
        *(["adversarial"] if attack != "clean" else []),
    ]
    fields = {
        "recipes": tuple(recipes),
        "batch_size": BATCH * (2 if accumulation else 1),
        "trainable": (".*",) if trains == "full" else (HEAD[family],),
        "model__remat": remat,
        "model__freeze_norm": trains in ADAPTERS and family != "vit",
        "lora__rules": (ADAPTED[family],),
        "lora__rank": 2,
        "lora__dora": trains == "dora",
        "adversarial__method": {"fgsm": "fast", "trades": "trades"}.get(attack, "pgd"),
        "adversarial__steps": STEPS,
        "optim__warmup_steps": 0,  # heads begin at zero, and so do attacks' gradients
        "optim__name": "sgd",  # Adam makes a step of a gradient that is rounding alone
        "optim__lr_multipliers": (),  # DETR's names a backbone that may be frozen
        "optim__ema_decay": 0.9 if average else 0.0,
        "optim__accumulate": 2 if accumulation else 1,
    }
    if teacher != "none":
        fields["distill__teachers"] = (teacher_of(TAUGHT_BY[family]),)
    if teacher == "features":
        pair = ("hint", *LAYERS[family], 1.0)
        fields |= {"distill__logits": "none", "distill__features": (pair,)}
    if family == "detr":
        config = detection_runs.tiny_config(**fields)
    else:
        arguments = VIT if family == "vit" else RESNET
        config = runs.tiny_config(
            model__weights="",
            model__variant=family,
            model__arguments=tuple(arguments.items()),
            model__reinitialize=(),
            **fields,
        )
    return runs.Prepared(devices=devices, fsdp=devices, config=config)


@functools.cache
def teacher_of(family):
    """A file with a random, somewhat bigger model."""
    path = runs.inputs() / f"composition_{family}.safetensors"
    if family == "vit":
        bigger = {**VIT, "width": 48, "num_heads": 3, "patch_size": 4, "image_size": (16, 16)}
        return runs.write_teacher(path, family, 4, 16, **bigger)
    if family == "resnet":
        return runs.write_teacher(path, family, 4, 16, **{**RESNET, "widths": (8, 24)})
    bigger = {**dict(detection_runs.ARGUMENTS), "widths": (8, 24)}
    return runs.write_teacher(path, family, 8, 48, **bigger)


def costs(compiled):
    """(FLOPs, bytes of temporaries) of a compiled function, on each device."""
    return cost.count(compiled).flops, compiled.memory_analysis().temp_size_in_bytes


def whole(cell, devices):
    """The costs of a cell's step."""
    if cell not in measured[devices]:
        measured[devices][cell] = costs(prepare(cell, devices).compiled())
    return measured[devices][cell]


measured = {1: {}, DEVICES: {}}  # costs of steps by cell


@functools.cache
def parts(family, trains, teacher, remat):
    """FLOPs of one micro-batch's forward pass, input gradient, training pass, and teacher."""
    prepared = prepare((family, trains, "clean", teacher, (False, False, remat)), 1)
    run = prepared.run
    predicts = run.student.predicts
    goal = run.task.make_objective(
        run.config, run.model, predicts, prepared.apply, prepared.plan.assemble, run.mesh
    )
    state, key = prepared.state, jax.random.key(0)
    batch = prepared.batch
    view = jax.jit(goal.prepare)({}, {}, {}, batch, key)

    def losses(image, trainable, frozen, view):
        view = {**view, "image": image}
        outputs, _ = goal.forward(trainable, frozen, state.model_state, view, key, train=False)
        return goal.criterion(trainable, outputs, view)[0].sum()

    def training(trainable, frozen, batch):
        return objective.make_loss(goal)(trainable, frozen, state.model_state, batch, key)[0]

    def cost_of(function, *arguments):
        return cost.count(jax.jit(function).lower(*arguments).compile()).flops

    own, frozen = (
        {path: leaf for path, leaf in flat.items() if not distillation.is_beside(path)}
        for flat in (state.trainable, prepared.frozen)
    )
    found = {
        "forward": cost_of(losses, view["image"], own, frozen, view),
        "input": cost_of(jax.value_and_grad(losses), view["image"], own, frozen, view),
        "training": cost_of(jax.value_and_grad(training), own, frozen, batch),
    }
    if teacher != "none":
        layers = LAYERS[family][1:] if teacher == "features" else ()
        teacher_forward = prepared.run.recipes[-1].teachers[0].make_forward(layers)

        def used(frozen, view):  # what nobody uses is not computed
            outputs = teacher_forward(frozen, {}, view)
            return outputs["features"] if layers else {**outputs, "features": {}}

        found["teacher"] = cost_of(used, prepared.frozen, view)
    return found


FEW = few_cells()
CELLS = [
    pytest.param(
        cell,
        id="-".join([*cell[:4], *("01"[on] for on in cell[4])]),
        marks=pytest.mark.long if cell in FEW else [pytest.mark.long, pytest.mark.hours],
    )
    for cell in every_cell()
]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_runs_and_costs_its_parts_on_one_device_and_on_many(cell, monkeypatch):
    monkeypatch.setattr(sharding, "SMALLEST_SHARDED", 1)
    family, trains, attack, teacher, switches = cell
    _, accumulation, remat = switches
    micro = 2 if accumulation else 1
    attacks = {"clean": 0, "fgsm": 1}.get(attack, STEPS)
    last = {}
    for devices in (1, DEVICES):
        prepared = prepare(cell, devices)
        kept = {path: np.array(leaf) for path, leaf in prepared.frozen.items()}
        step = prepared.compiled()  # the one: it refuses a state that is laid out otherwise
        flops, memory = measured[devices][cell] = costs(step)
        last[devices], finite = train(step, prepared.state, prepared.frozen, prepared.batch)
        assert finite
        for path, leaf in prepared.frozen.items():
            np.testing.assert_array_equal(leaf, kept[path], err_msg=path)
        if family == "detr":
            last[devices] = loss_in_float64(cell, devices, monkeypatch)

        alone = [whole((family, trains, attack, "none", switches), devices)]
        alone += [whole((family, trains, "clean", teacher, switches), devices)]
        largest = max(bytes_ for _, bytes_ in alone)
        print(f"memory on {devices}: {memory:,} beside {largest:,}: {memory / largest - 1:+.1%}")
        assert memory <= 1.1 * largest
        if devices > 1:
            continue
        part = parts(family, trains, teacher, remat)
        plain = whole((family, trains, "clean", "none", switches), 1)
        expected = plain[0] + micro * attacks * part["input"]
        if attack == "trades":  # a second training pass, and what plain images are to begin with
            expected += micro * (part["training"] + part["forward"])
        if teacher != "none":
            expected += micro * part["teacher"]
        if teacher == "features":
            expected += projection_flops(cell, prepared, attacks)
        print(f"FLOPs: {flops:,.0f} beside {expected:,.0f}: {flops / expected - 1:+.2%}")
        assert flops <= 1.02 * expected
        assert flops >= 0.98 * expected or remat  # the CPU's compiler may undo recomputation
    difference = abs(last[1] - last[DEVICES]) / abs(last[1])
    print(f"losses differ by {difference:.1e}")
    assert difference <= (1e-12 if family == "detr" else 1e-6)


def train(step, state, frozen, batch):
    """The loss of the third step, and whether all were finite."""
    finite = True
    for _ in range(3):
        state, metrics = step(state, frozen, batch)
        finite &= bool(metrics["finite"])
    return float(metrics["loss"]), finite


def loss_in_float64(cell, devices, monkeypatch):
    """Of the third step: attacks on a detector raise the rounding of float32 above 1e-6."""

    def widen(leaf):
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    with monkeypatch.context() as patch, jax.enable_x64(True):
        patch.setitem(DTYPES, "float32", jnp.float64)
        prepared = prepare(cell, devices)
        inputs = jax.tree.map(widen, (prepared.state, prepared.frozen, prepared.batch))
        return train(prepared.step.lower(*inputs).compile(), *inputs)[0]


def projection_flops(cell, prepared, attacks):
    """Of a hint: its product, the kernel's gradient, and that of the student's features."""
    _, trains, attack, _, _ = cell
    [shape] = [leaf.shape for leaf in prepared.plan.projections.values()]
    [name] = [match[1] for match in prepared.config.distill.features]
    places = recipe._feature_shape(prepared.model, prepared.image_size, name)[1:-1]
    passes = 2 + (trains != "linear")
    if attack in ("fgsm", "pgd"):  # trades' attack raises the divergence alone
        passes += 2 * attacks
    return passes * 2 * prepared.config.batch_size * np.prod(places) * np.prod(shape)
