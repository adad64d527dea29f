"""Cached teacher outputs: bit-identical, from whole files only, of the same run only."""

import pickle

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vision_jax.data.order import OwnRows
from vision_jax.data.teacher_cache import TeacherCache, open_teacher_cache, write_teacher_cache
from vision_jax.errors import UserError
from vision_jax.models.families import build_model
from vision_jax.ops import distillation

IDENTITY = {
    "teacher": "ab" * 32,
    "preprocessing": {"image_size": (8, 8), "mean": (0.5, 0.5, 0.5)},
    "augmentation": {"seed": 3, "flip": True},
}


def batches_of(arrays, size=4):
    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


def make_arrays(rng, count=10):
    features = rng.normal(size=(count, 2, 3)).astype(np.float32)
    features[0, 0] = np.nan, -0.0, np.inf
    return {
        "values": rng.normal(size=(count, 5)).astype(np.float16),
        "classes": rng.integers(0, 9, (count, 5), np.int32),
        "rest": rng.normal(size=count),
        "features": features,
        "tokens": np.asarray(jnp.asarray(rng.normal(size=(count, 2)), jnp.bfloat16)),
    }


def same_bits(result, expected):
    assert result.keys() == expected.keys()
    for name, array in expected.items():
        assert (result[name].dtype, result[name].shape) == (array.dtype, array.shape)
        assert result[name].tobytes() == array.tobytes(), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "teacher.array_record"


def test_arrays_come_back_bit_identical_in_any_order(path, rng):
    arrays = make_arrays(rng)
    assert write_teacher_cache(path, batches_of(arrays), IDENTITY) == 10
    assert list(path.parent.iterdir()) == [path]
    cache = open_teacher_cache(path, IDENTITY)
    assert cache.count == 10
    for order in (np.arange(10), rng.integers(0, 10, 30)):
        same_bits(cache.read(order), {name: array[order] for name, array in arrays.items()})
    again = pickle.loads(pickle.dumps(cache))
    assert again == cache
    same_bits(again.read([7]), {name: array[7:8] for name, array in arrays.items()})


def test_batches_are_those_of_the_stream_on_any_number_of_processes(path, rng):
    """As the images are dealt out."""
    arrays = make_arrays(rng, 24)
    write_teacher_cache(path, batches_of(arrays), IDENTITY)
    cache = open_teacher_cache(path, IDENTITY)
    for processes in (1, 3):
        size = 6 // processes
        for process in range(processes):
            stream = OwnRows(grain.MapDataset.range(24), size, process, processes)
            dealt = stream.batch(size).map_with_index(lambda step, numbers: (step, numbers))
            for step, numbers in dealt:
                batch = cache.batch(step, size, process_index=process, process_count=processes)
                same_bits(batch, {name: array[numbers] for name, array in arrays.items()})


def test_another_run_is_told_what_differs(path, rng):
    write_teacher_cache(path, batches_of(make_arrays(rng)), IDENTITY)
    others = {
        "teacher abababababababab, and this run has cdcdcdcdcdcdcdcd": {"teacher": "cd" * 32},
        "augmentation.seed 3, and this run has 4": {"augmentation": {"seed": 4, "flip": True}},
        "augmentation.flip True, and this run has None": {"augmentation": {"seed": 3}},
        r"preprocessing.image_size \[8, 8\], and this run has None": {"preprocessing": {}},
        "k None, and this run has 5": {"k": 5},
    }
    for message, change in others.items():
        with pytest.raises(UserError, match=f"stored with .*{message}.*: store it again"):
            open_teacher_cache(path, IDENTITY | change)


def test_numbers_that_were_not_stored(path, rng):
    write_teacher_cache(path, batches_of(make_arrays(rng)), IDENTITY)
    cache = open_teacher_cache(path, IDENTITY)
    for number in (10, -1):  # 10 is the header
        with pytest.raises(UserError, match=f"of 10 examples and not of number {number}"):
            cache.read([0, number])
    with pytest.raises(UserError, match="not of number 10"):
        cache.batch(2, 4)


def test_damaged_files_are_refused(path, rng):
    write_teacher_cache(path, batches_of(make_arrays(rng, 50)), IDENTITY)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 70_000])
    with pytest.raises(UserError, match=r"no cached teacher outputs|damaged"):
        open_teacher_cache(path, IDENTITY)
    changed = bytearray(whole)
    changed[whole.index(b"\x80\x7f")] ^= 1  # inf, of the first example
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"damaged \(.*\): store the teacher's outputs again"):
        open_teacher_cache(path, IDENTITY).read(range(50))
    path.write_bytes(b"something else")
    with pytest.raises(UserError, match="no cached teacher outputs"):
        open_teacher_cache(path, IDENTITY)
    with pytest.raises(UserError, match="no such file: store the teacher's outputs first"):
        open_teacher_cache(path.parent / "nothing", IDENTITY)


def test_a_write_that_fails_leaves_what_was_there(path, rng):
    write_teacher_cache(path, batches_of(make_arrays(rng)), IDENTITY)
    held = path.read_bytes()

    def broken():
        yield make_arrays(rng)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_teacher_cache(path, broken(), IDENTITY)
    kinds = [make_arrays(rng), make_arrays(rng) | {"rest": np.zeros(10, np.float32)}]
    uneven = [make_arrays(rng) | {"rest": np.zeros(9)}]
    for batches, message in ((kinds, "a batch of"), (uneven, r"\[9, 10\]"), ([], "no examples")):
        with pytest.raises(UserError, match=message):
            write_teacher_cache(path, batches, IDENTITY)
    assert path.read_bytes() == held
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match=r"not written .*; give another path"):
        write_teacher_cache(path / "below", batches_of(make_arrays(rng)), IDENTITY)


@pytest.mark.long
def test_the_loss_is_that_of_a_live_teacher_bit_identical(path, rng):
    """The teacher inside the student's program, and its stored top logits read from the file."""
    sizes = {"image_size": (8, 8), "patch_size": 4, "depth": 2, "num_heads": 2, "mlp_width": 48}
    teacher, student = (build_model("vit", num_classes=20, width=w, **sizes) for w in (32, 16))
    images = jnp.asarray(rng.random((12, 8, 8, 3)), jnp.float32)

    def draw(model):
        shapes = jax.eval_shape(model.init, jax.random.key(0), images)
        return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.3, x.dtype), shapes)

    told, taught = draw(teacher), draw(student)

    def teach(images):
        top = distillation.compress_logits(teacher.apply(told, images), 5, temperature=2.0)
        return jax.lax.optimization_barrier(top._asdict())

    def loss(variables, images, told):
        logits = distillation.expand_logits(distillation.TopLogits(**told), 20)
        return distillation.soft_logits(student.apply(variables, images), logits, 2.0).mean()

    live = jax.jit(jax.value_and_grad(lambda v, images: loss(v, images, teach(images))))
    stored = jax.jit(jax.value_and_grad(loss))
    views = [images[start : start + 4] for start in (0, 4, 8)]
    write_teacher_cache(path, map(jax.jit(teach), views), IDENTITY)
    cache: TeacherCache = open_teacher_cache(path, IDENTITY)
    for step, view in enumerate(views):
        expected, result = live(taught, view), stored(taught, view, cache.batch(step, 4))
        jax.tree.map(np.testing.assert_array_equal, expected, result)

    def flops(function, *arrays):
        return function.lower(*arrays).compile().cost_analysis()["flops"]

    alone = flops(stored, taught, views[0], cache.batch(0, 4))
    assert flops(live, taught, views[0]) > 1.5 * alone
