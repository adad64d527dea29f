"""Paths name every array once, and rules choose among them or say why not."""

import jax
import jax.numpy as jnp
import pytest

from vision_jax.errors import UserError
from vision_jax.trees import paths
from vision_jax.trees.low_rank import LowRank

TREE = {
    "block_0": {"mlp": {"fc1": {"bias": 1, "kernel": 2}}},
    "head": {"kernel": LowRank(3, 4, 5)},
    "pos_embed": 6,
}


def test_flatten_names_the_arrays_of_structured_leaves():
    assert paths.flatten(TREE) == {
        "block_0/mlp/fc1/bias": 1,
        "block_0/mlp/fc1/kernel": 2,
        "head/kernel/base": 3,
        "head/kernel/a": 4,
        "head/kernel/b": 5,
        "pos_embed": 6,
    }


def test_unflatten_is_the_inverse_in_any_order():
    flat = paths.flatten(TREE)
    shuffled = dict(reversed(list(flat.items())))
    assert paths.unflatten(TREE, shuffled) == TREE
    doubled = paths.unflatten(TREE, {path: 2 * leaf for path, leaf in flat.items()})
    assert doubled == jax.tree.map(lambda leaf: 2 * leaf, TREE)


def test_unflatten_refuses_other_paths():
    flat = paths.flatten(TREE)
    flat["haed/bias"] = flat.pop("pos_embed")
    with pytest.raises(KeyError, match=r"missing \['pos_embed'\], unexpected \['haed/bias'\]"):
        paths.unflatten(TREE, flat)


def test_rules_match_whole_paths():
    names = ["block_0/fc1/kernel", "block_1/fc1/kernel", "block_10/fc1/kernel", "fc1/kernel"]
    assert paths.select(names, [r"block_1/.*", "fc1/kernel"], field="f") == {names[1], names[3]}
    assert paths.select(names, [r"block_\d+/fc1/kernel", ".*"], field="f") == set(names)
    assert paths.select(names, [], field="f") == set()


def test_rule_without_a_match_names_field_and_nearest_path():
    names = ["head/kernel", "block_0/attn/qkv/kernel", "block_0/attn/proj/kernel"]
    with pytest.raises(UserError, match=r"^lora\.rules: rule .*nearest path is 'block_0/attn/qkv"):
        paths.select(names, [".*", r"block_\d+/atn/qkv/kernel"], field="lora.rules")
    with pytest.raises(UserError, match=r"^trainable: rule 'head' matches no parameter"):
        paths.select(names, ["head"], field="trainable")
    with pytest.raises(UserError, match=r"^trainable: '\(' is not a regular expression"):
        paths.select(names, ["("], field="trainable")


def test_partition_covers_everything_and_keeps_order():
    flat = paths.flatten(TREE)
    chosen, rest = paths.partition(flat, {"pos_embed", "block_0/mlp/fc1/bias"})
    assert list(chosen) == ["block_0/mlp/fc1/bias", "pos_embed"]
    assert {**chosen, **rest} == flat
    assert not set(chosen) & set(rest)


def test_paths_survive_abstract_values():
    shapes = jax.eval_shape(lambda: {"a": {"kernel": LowRank(*map(jnp.ones, (2, 3, 4)))}})
    assert [x.shape for x in paths.flatten(shapes).values()] == [(2,), (3,), (4,)]
