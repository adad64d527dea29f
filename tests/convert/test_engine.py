"""The engine on small tables: strict on both sides, and the identity on the way back."""

import jax
import numpy as np
import pytest

from vision_jax.convert import engine
from vision_jax.convert.engine import (
    Fixed,
    Rule,
    affine,
    export_tensors,
    fused,
    import_tensors,
    norm,
)
from vision_jax.errors import UserError

TABLE = (
    *affine("stem", "stem", engine.CONV),
    Rule(("class",), ("cls_token",), engine.ADD_2),
    Rule(("positions",), ("pos_embed",), engine.ADD_1),
    *norm("layers.{i}.ln", "block_{i}/norm1"),
    *fused([f"layers.{{i}}.{part}" for part in "qkv"], "block_{i}/qkv"),
    Rule(("pool.in_weight",), ("pool/q/kernel", "pool/kv/kernel"), engine.SPLIT_LINEAR),
    Rule(("pool.in_bias",), ("pool/q/bias", "pool/kv/bias"), engine.SPLIT_BIAS),
    *affine("head", "head"),
)
RULES = engine.expand(TABLE, depth=2)


def draw(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def checkpoint(rng):
    tensors = {
        "stem.weight": draw(rng, 4, 3, 2, 2),
        "stem.bias": draw(rng, 4),
        "class": draw(rng, 4),
        "positions": draw(rng, 9, 4),
        "pool.in_weight": draw(rng, 12, 4),
        "pool.in_bias": draw(rng, 12),
        "head.weight": draw(rng, 5, 4),
        "head.bias": draw(rng, 5),
    }
    for i in range(2):
        tensors |= {f"layers.{i}.ln.weight": draw(rng, 4), f"layers.{i}.ln.bias": draw(rng, 4)}
        tensors |= {f"layers.{i}.{part}.weight": draw(rng, 4, 4) for part in "qkv"}
        tensors |= {f"layers.{i}.{part}.bias": draw(rng, 4) for part in "qkv"}
    return tensors


def target(classes=5):
    shapes = {
        "stem/kernel": (2, 2, 3, 4),
        "stem/bias": (4,),
        "cls_token": (1, 1, 4),
        "pos_embed": (1, 9, 4),
        "pool/q/kernel": (4, 4),
        "pool/kv/kernel": (4, 8),
        "pool/q/bias": (4,),
        "pool/kv/bias": (8,),
        "head/kernel": (4, classes),
        "head/bias": (classes,),
    }
    for i in range(2):
        shapes |= {f"block_{i}/norm1/scale": (4,), f"block_{i}/norm1/bias": (4,)}
        shapes |= {f"block_{i}/qkv/kernel": (4, 12), f"block_{i}/qkv/bias": (12,)}
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


def test_layouts_written_out(rng):
    tensors = checkpoint(rng)
    params = import_tensors(tensors, RULES, target())
    x = draw(rng, 4)
    np.testing.assert_allclose(x @ params["head/kernel"], tensors["head.weight"] @ x, rtol=1e-5)
    q, k, v = np.split(x @ params["block_1/qkv/kernel"] + params["block_1/qkv/bias"], 3)
    for part, ours in zip("qkv", (q, k, v), strict=True):
        theirs = tensors[f"layers.1.{part}.weight"] @ x + tensors[f"layers.1.{part}.bias"]
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    packed = tensors["pool.in_weight"] @ x
    split = np.concatenate([x @ params["pool/q/kernel"], x @ params["pool/kv/kernel"]])
    np.testing.assert_allclose(split, packed, rtol=1e-4, atol=1e-5)
    stem = tensors["stem.weight"]
    assert params["stem/kernel"][1, 0, 2, 3] == stem[3, 2, 1, 0]


def test_round_trip_is_bit_identical(rng):
    tensors = checkpoint(rng)
    back = export_tensors(import_tensors(tensors, RULES, target()), RULES)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert back[name].tobytes() == tensor.tobytes()


def test_missing_and_unexpected_are_both_listed_with_the_nearest_name(rng):
    tensors = checkpoint(rng)
    tensors["head.weigth"] = tensors.pop("head.weight")
    with pytest.raises(UserError) as caught:
        import_tensors(tensors, RULES, target())
    message = str(caught.value)
    assert "1 parameters get no tensor: head/kernel (from head.weight)" in message
    assert "1 tensors have no place: head.weigth; the nearest known name" in message
    assert "head.weight;" in message


def test_a_part_of_a_fused_parameter_is_missing(rng):
    tensors = checkpoint(rng)
    del tensors["layers.0.k.bias"]
    with pytest.raises(UserError, match=r"lack: layers\.0\.k\.bias"):
        import_tensors(tensors, RULES, target())


@pytest.mark.parametrize("shape", [(6, 4), (4,), (1, 5, 4)])
def test_wrong_shapes_are_shown_on_both_sides(shape, rng):
    tensors = checkpoint(rng) | {"head.weight": draw(rng, *shape)}
    with pytest.raises(UserError, match="1 do not fit") as caught:
        import_tensors(tensors, RULES, target())
    assert str(shape) in str(caught.value)
    assert "(4, 5)" in str(caught.value)


def test_integers_are_no_weights(rng):
    tensors = checkpoint(rng) | {"head.bias": np.zeros(5, np.int8)}
    with pytest.raises(UserError, match=r"head\.bias is int8"):
        import_tensors(tensors, RULES, target())


def test_a_block_too_many_is_unexpected(rng):
    tensors = checkpoint(rng) | {"layers.2.ln.weight": draw(rng, 4)}
    with pytest.raises(UserError, match=r"no place: layers\.2\.ln\.weight"):
        import_tensors(tensors, RULES, target())


def test_skipped_paths_take_their_tensors_in_any_shape_or_none(rng):
    skip = {"head/kernel", "head/bias"}
    for tensors in (checkpoint(rng), {k: v for k, v in checkpoint(rng).items() if "head" not in k}):
        params = import_tensors(tensors, RULES, target(classes=9), skip=skip)
        assert set(params) == set(target()) - skip


def test_only_what_is_dropped_by_its_whole_name_may_be_left_over(rng):
    tensors = checkpoint(rng) | {"mask": draw(rng, 4)}
    import_tensors(tensors, RULES, target(), dropped=("mask",))
    with pytest.raises(UserError, match="no place: mask"):
        import_tensors(tensors, RULES, target(), dropped=("mas",))


def test_a_table_that_writes_twice_raises_in_both_directions(rng):
    twice = (*RULES, Rule(("positions",), ("pos_embed",), engine.ADD_1))
    with pytest.raises(ValueError, match="writes pos_embed twice"):
        import_tensors(checkpoint(rng), twice, target())
    with pytest.raises(ValueError, match="writes tensor positions twice"):
        export_tensors(import_tensors(checkpoint(rng), RULES, target()), twice)


def test_a_parameter_without_a_name_is_not_lost_in_an_export(rng):
    params = import_tensors(checkpoint(rng), RULES, target()) | {"extra": draw(rng, 2)}
    with pytest.raises(UserError, match="no name for extra"):
        export_tensors(params, RULES)


def test_what_an_architecture_determines_is_checked_and_written(rng):
    fixed = Fixed("index", lambda: np.arange(4))
    rules = [*RULES, fixed, Fixed("scale", lambda: np.ones(2, np.float32), exact=False)]
    tensors = checkpoint(rng) | {"index": np.arange(4), "scale": np.float32([1.001, 0.999])}
    back = export_tensors(import_tensors(tensors, rules, target()), rules)
    np.testing.assert_array_equal(back["index"], np.arange(4))
    assert set(back) == set(tensors)
    import_tensors(checkpoint(rng), rules, target())  # older files lack them
    for wrong in ({"index": np.arange(5)}, {"index": np.arange(4)[::-1]}, {"scale": np.ones(3)}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} has not the values"):
            import_tensors(tensors | wrong, rules, target())


def test_statistics_come_with_their_count_or_without(rng):
    """torch before 0.4.1 counted no updates; what it counts in 64 bits we count in 32."""
    rules = engine.batch_norm("bn", "bn")
    like = {f"bn/{name}": jax.ShapeDtypeStruct((3,), np.float32) for name in ("mean", "var")}
    like |= {f"bn/{name}": jax.ShapeDtypeStruct((3,), np.float32) for name in ("scale", "bias")}
    like["bn/count"] = jax.ShapeDtypeStruct((), np.int32)
    names = ("weight", "bias", "running_mean", "running_var")
    old = {f"bn.{name}": draw(rng, 3) for name in names}
    filled = import_tensors(old, rules, like)
    assert filled["bn/count"].dtype == np.int32
    assert (filled["bn/count"].shape, int(filled["bn/count"])) == ((), 0)
    new = old | {"bn.num_batches_tracked": np.asarray(7)}
    back = export_tensors(import_tensors(new, rules, like), rules)
    assert (int(back["bn.num_batches_tracked"]), back["bn.num_batches_tracked"].dtype) == (7, "i8")
    with pytest.raises(UserError, match="bn/count"):
        import_tensors(new | {"bn.num_batches_tracked": draw(rng, 1)[0]}, rules, like)
    headless = {path: leaf for path, leaf in like.items() if path != "bn/count"}
    with pytest.raises(UserError, match=r"no place: bn\.num_batches_tracked"):
        import_tensors(new, rules, headless)
