"""Generation as a task: the loss, images that depend on their index alone, and classes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vision_jax import cost
from vision_jax.config import default_config
from vision_jax.data.sources import read_source, take_classes
from vision_jax.errors import UserError
from vision_jax.generate import samples
from vision_jax.models.families import build_model, initialize, make_apply
from vision_jax.run.prepare import prepare
from vision_jax.tasks.generation import objective

SHAPE = (8, 8, 3)


def tiny(predicts="image", **changed):
    arguments = {
        "num_classes": 3,
        "image_size": (8, 8),
        "patch_size": 4,
        "width": 16,
        "depth": 1,
        "num_heads": 2,
        "mlp_width": 32,
        "in_channels": 3,
        "predicts": predicts,
    }
    return build_model("dit", **{**arguments, **changed})


def randomized(model, seed=0):
    """Its parameters, all random, also those of adaLN-zero."""
    params = initialize(model, jax.random.key(seed), (8, 8))["params"]
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def task_of(model, **changed):
    settings = {"predicts": model.predicts, "num_classes": model.num_classes, "shape": SHAPE,
                "time_mean": 0.0, "time_std": 1.0, "unconditional": 0.2}  # fmt: skip
    return objective.Task(**{**settings, **changed})


def sampling(**changed):
    settings = {"method": "heun", "steps": 3, "guidance": 2.0, "interval": (0.2, 0.9),
                "shift": 1.0, "seed": 7}  # fmt: skip
    return objective.Sampling(**{**settings, **changed})


def sampler(model, **changed):
    run = objective.make_sample(
        make_apply(model), lambda params: params, task_of(model), sampling(**changed)
    )
    params = randomized(model)

    def sample(labels, index, images=None, fresh=None):
        clean = None if images is None else objective.centered(images)
        return objective.shown(run(params, {}, {}, labels, index, clean, fresh))

    return jax.jit(sample)


def batch_of(rng, count=6):
    return {
        "image": jnp.asarray(rng.integers(0, 256, (count, *SHAPE)), jnp.uint8),
        "label": jnp.arange(count, dtype=jnp.int32) % 3,
        "index": jnp.arange(count, dtype=jnp.int32),
        "mask": jnp.ones(count, bool),
    }


@pytest.mark.parametrize("predicts", ["image", "velocity"])
def test_the_loss_is_of_the_velocity(rng, predicts):
    model = tiny(predicts)
    made = objective.make_objective(make_apply(model), lambda params: params, task_of(model))
    params, batch = randomized(model), batch_of(rng)
    view = made.prepare(params, {}, {}, batch, jax.random.key(3))
    outputs, _ = made.forward(params, {}, {}, view, jax.random.key(4), train=True)
    losses, _ = made.criterion(params, outputs, view)

    time = np.asarray(view["time"], np.float64).reshape(-1, 1, 1, 1)
    image = 2 * np.asarray(batch["image"], np.float64) / 255 - 1
    noise, noisy = (np.asarray(view[name], np.float64) for name in ("noise", "noisy"))
    np.testing.assert_allclose(noisy, time * image + (1 - time) * noise, atol=1e-6)
    found = np.asarray(outputs["prediction"], np.float64)
    true = image - noise
    if predicts == "image":
        left = np.maximum(1 - time, 0.05)
        found, true = (found - noisy) / left, (image - noisy) / left
    np.testing.assert_allclose(losses, ((found - true) ** 2).mean((1, 2, 3)), rtol=1e-4)


def test_classes_are_left_out_as_often_as_asked(rng):
    model = tiny()
    batch = batch_of(rng, 400)
    for share in (0.0, 0.25, 1.0):
        task = task_of(model, unconditional=share)
        made = objective.make_objective(make_apply(model), lambda params: params, task)
        asked = np.asarray(made.prepare({}, {}, {}, batch, jax.random.key(5))["asked"])
        assert abs((asked == 3).mean() - share) < 0.08
        kept = asked != 3
        np.testing.assert_array_equal(asked[kept], np.asarray(batch["label"])[kept])


def test_an_image_is_the_same_in_every_batch():
    sample = sampler(tiny())
    labels, index = jnp.arange(8, dtype=jnp.int32) % 3, jnp.arange(20, 28, dtype=jnp.int32)
    together = np.asarray(sample(labels, index))
    alone = [np.asarray(sample(labels[i : i + 1], index[i : i + 1]))[0] for i in range(8)]
    np.testing.assert_array_equal(together, alone)
    assert (np.abs(together[0] - together[3]) > 1e-3).any()  # the same class, another index
    other = np.asarray(sampler(tiny(), seed=8)(labels, index))
    assert (np.abs(together - other) > 1e-3).any()


@pytest.mark.parametrize(
    ("count", "batch_size"),
    [(5, 2), *(pytest.param(*pair, marks=pytest.mark.long) for pair in ((3, 8), (8, 8), (1, 1)))],
)
def test_images_of_any_number_are_one_program(count, batch_size, monkeypatch):
    """Traced and compiled once, whatever is left for the last batch."""
    make, traces = samples._make_program, []

    def counted(generator):
        program = make(generator)

        def traced(*arguments):
            traces.append([x.shape for x in jax.tree.leaves(arguments[2:])])
            return program(*arguments)

        return traced

    monkeypatch.setattr(samples, "_make_program", counted)
    model = tiny()
    generator = samples.Generator(
        model, {"params": randomized(model)}, ("a", "b", "c"), task_of(model), sampling(), None
    )
    index = np.arange(count, dtype=np.int32)
    made = list(samples.make_images(generator, samples.Wanted(index % 3, index), batch_size))
    assert [len(batch) for batch in made] == [
        min(batch_size, count - start) for start in range(0, count, batch_size)
    ]
    size = min(count, batch_size)
    assert traces == [[(size,), (size,)]]


def test_images_stay_below_their_folder():
    names = ["", ".", "..", "...", "a/b", "../a", "cat"]
    index = np.arange(len(names) + 1)
    paths = samples.sample_paths(samples.Wanted(index, index), names)
    assert len(set(paths)) == len(paths)
    for number, path in enumerate(paths):
        folder, file = path.split("/")
        assert folder.strip(".")
        assert file == f"{number:06d}.png"
    assert paths[-2:] == ["cat/000006.png", "no class/000007.png".replace(" ", "_")]


@pytest.mark.long
def test_the_lora_step_of_a_dit_s_has_at_most_72_percent_of_the_products():
    """Of what is compiled: each block costs the same, so two and four tell of all twelve."""
    adapters = {
        "recipes": ("lora",), "lora.rank": 8, "lora.qkv_parts": "q,k,v",
        "lora.rules": (r"block_\d+/(attn/(qkv|proj)|mlp/fc\d)/kernel",),
        "trainable": ("class_embed",),
    }  # fmt: skip
    sizes = {"patch_size": 2, "width": 384, "num_heads": 6, "mlp_width": 1536, "in_channels": 3,
             "predicts": "velocity"}  # fmt: skip

    def flops(depth, changed):
        config = default_config("generation")
        arguments = (*sizes.items(), ("depth", depth))
        shape = {"model.variant": "dit", "model.image_size": 32, "model.arguments": arguments}
        config.update_from_flattened_dict({"batch_size": 8, **shape, **changed})
        mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
        prepared = prepare(config, tuple(map(str, range(1000))), mesh=mesh)
        state, frozen = prepared.abstract_state, prepared.parameters.abstract()[1]
        step = prepared.make_train_step().lower(state, frozen, prepared.abstract_batch())
        return cost.count(step.compile()).flops

    def of_all(changed):
        two, four = flops(2, changed), flops(4, changed)
        return two + 5 * (four - two)

    whole, adapted = of_all({}), of_all(adapters)
    forward = 2 * 8 * 256 * 12 * (12 * 384**2 + 2 * 256 * 384)  # of the blocks' products
    assert 3 * forward < whole < 3.05 * forward
    assert adapted / whole <= 0.72


@pytest.mark.long
def test_guidance_is_none_outside_of_its_interval_and_at_1():
    labels, index = jnp.array([0, 1, 2]), jnp.arange(3)
    plain = np.asarray(sampler(tiny(), guidance=1.0)(labels, index))
    nowhere = np.asarray(sampler(tiny(), interval=(2.0, 3.0))(labels, index))
    np.testing.assert_allclose(nowhere, plain, atol=1e-6)
    assert np.abs(np.asarray(sampler(tiny())(labels, index)) - plain).max() > 1e-3


def test_what_is_known_stays_to_the_pixel(rng):
    labels, index = jnp.array([0, 1]), jnp.arange(2)
    images = jnp.asarray(rng.random((2, *SHAPE)), jnp.float32)
    fresh = jnp.zeros((2, 8, 8, 1), bool).at[:, 2:5, 3:7].set(True)
    made = np.asarray(sampler(tiny())(labels, index, images, fresh))
    outside = ~np.asarray(fresh)[..., 0]
    np.testing.assert_allclose(made[outside], np.asarray(images)[outside], atol=1e-6)
    assert np.abs(made - np.asarray(images)).max() > 1e-2


@pytest.mark.long
def test_less_strength_stays_nearer(rng):
    labels, index = jnp.array([0, 1]), jnp.arange(2)
    images = jnp.asarray(rng.random((2, *SHAPE)), jnp.float32)
    apart = [
        np.abs(np.asarray(sampler(tiny("velocity"), strength=s)(labels, index, images)) - images)
        for s in (0.05, 0.5, 1.0)
    ]
    means = [x.mean() for x in apart]
    assert means == sorted(means)
    assert means[0] < 0.1
    noise_alone = np.asarray(sampler(tiny("velocity"))(labels, index))
    from_noise = np.asarray(sampler(tiny("velocity"), strength=1.0)(labels, index, images))
    np.testing.assert_allclose(from_noise, noise_alone, atol=1e-6)


def test_classes_of_a_source():
    source = read_source("embedded:fashion_mnist/test")
    part = take_classes(source, ("bag", "coat"))
    assert part.class_names == ("bag", "coat")
    assert len(part) == 200
    for row in (0, 57, 199):
        whole = int(np.flatnonzero(source.rows == part.rows[row])[0])
        assert part.class_names[part.labels[row]] == source.class_names[source.labels[whole]]
    with pytest.raises(UserError, match="no class 'bags': did you mean `bag`"):
        take_classes(source, ("bags",))
    with pytest.raises(UserError, match="class 'bag' is named twice"):
        take_classes(source, ("bag", "bag"))
