"""Token merging in runs: where the number of tokens comes from, and what goes out of the door."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import convert, main, train
from vision_jax.config import load_config
from vision_jax.errors import UserError
from vision_jax.explain.explainer import choose_methods
from vision_jax.explain.forward import Forward
from vision_jax.explain.methods import OF_MAPS
from vision_jax.loaded import load
from vision_jax.run.description import describe, read_weights
from vision_jax.trees import paths


def described(**fields):
    config = runs.tiny_config(**fields)
    return describe(config, read_weights(config), runs.CLASSES)


def written(path, merge):
    """The random weights of all tests, in a file whose model merges tokens."""
    loaded = load(runs.teacher())
    flat = {name: np.asarray(x) for name, x in paths.flatten(loaded.variables["params"]).items()}
    arguments = {**convert.arguments_of(loaded.model), "merge": merge}
    convert.write_safetensors(path, *convert.export_weights(flat, "vit", arguments))
    return path


def test_the_config_says_it_or_the_weights(tmp_path):
    assert described().arguments["merge"] == 0
    assert described(model__merge=1).arguments["merge"] == 1
    assert described(model__merge=0.25).arguments["merge"] == 0.25
    path = written(tmp_path / "merging.safetensors", 1.0)
    assert load(path).model.merge == 1
    own = {"model__weights": path}
    assert described(**own).arguments["merge"] == 1
    assert described(**own, model__merge=0).arguments["merge"] == 0


@pytest.mark.parametrize("merge", ["1.5", "-2", "nan"])
def test_bad_numbers_are_refused_in_the_config(merge):
    with pytest.raises(UserError, match=r"merge`? (is|takes)"):
        runs.tiny_config(model__merge=merge)


def test_families_without_tokens_refuse():
    with pytest.raises(UserError, match="merge: resnet has no tokens that merge"):
        described(model__weights="", model__variant="resnet18", model__merge=2)


def test_maps_of_tokens_are_no_grid_and_gradients_are_taken():
    loaded = load(runs.teacher())

    def choose(merge, *asked):
        model = Forward(loaded.model.clone(merge=merge))
        return choose_methods(model, loaded.variables, (16, 16), asked)

    left_out = {*OF_MAPS, "attention_rollout", "attention_relevance"}
    assert set(choose(0)) - set(choose(1)) == left_out
    for name in left_out:
        with pytest.raises(UserError, match=r"tokens merge \(model.merge 1\)"):
            choose(1, name)
    assert choose(1, "rise") == ["rise"]


def test_attention_behind_a_merge_is_compared_with_its_like():
    features = "(('attention_maps', 'block_1/attention', 'block_1/attention', 1.0),)"
    weights = deeper()
    with pytest.raises(
        UserError, match=r"student gives .*, 2, 4, 4\) and the teacher .*, 2, 5, 5\)"
    ):
        loss_of(features, weights, model__weights=weights)
    loss_of(features.replace("block_1", "block_0"), weights, model__weights=weights)


def test_features_behind_a_merge_are_no_grid():
    with pytest.raises(
        UserError, match="4 tokens, some of which have merged, are no grid of 2 x 2"
    ):
        loss_of("(('hint', 'block_0', 'block_0', 1.0),)")
    loss_of("(('hint', 'embed', 'embed', 1.0), ('hint', 'pooled', 'pooled', 1.0))")


@functools.cache
def deeper():
    """The file of a ViT of two blocks: what merges in the first is seen by the second."""
    path = runs.inputs() / "deeper.safetensors"
    sizes = {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "patch_size": 8}
    runs.write_teacher(path, "vit", len(runs.CLASSES), 16, **sizes, image_size=(16, 16))
    return path


def loss_of(features, teacher=None, **fields):
    prepared = runs.Prepared(
        model__merge=1,
        recipes="('distill',)",
        trainable=".*",
        distill__teachers=f"('{teacher or runs.teacher()}',)",
        distill__features=features,
        **fields,
    )
    return jax.eval_shape(
        prepared.loss_fn,
        prepared.state.trainable,
        prepared.frozen,
        {},
        {**prepared.batch, "step": 0},
        jax.random.key(0),
    )


@pytest.mark.long
def test_a_run_that_merges_is_evaluated_loaded_exported_and_converted(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train.run(runs.tiny_config(model__merge=1, model__weights=deeper()), workdir) == 0
    held = json.loads((workdir / "model.json").read_text())
    assert held["arguments"]["merge"] == 1
    loaded = load(workdir)
    assert loaded.model.merge == 1

    images = np.random.default_rng(0).random((4, 16, 16, 3)).astype(np.float32)
    few, all_ = (
        jax.jit(model.apply)(loaded.variables, images)
        for model in (loaded.model, loaded.model.clone(merge=0))
    )
    assert jnp.abs(few - all_).max() > 1e-4

    capsys.readouterr()
    said = {}
    for merge in (None, 1, 0):
        flags = [] if merge is None else [f"--config.model.merge={merge}"]
        assert main.main(["evaluate", f"--workdir={workdir}", *flags]) == 0
        said[merge] = next(x for x in capsys.readouterr().out.splitlines() if "loss" in x)
    assert said[None] == said[1] != said[0]

    for merge in (None, 0):
        out = tmp_path / str(merge)
        flags = [] if merge is None else [f"--merge={merge}"]
        given = ["export", str(workdir), "--to=stablehlo", f"--out={out}", "--seed=1", *flags]
        assert main.main(given) == 0
    sizes = {m: (tmp_path / str(m) / "model.stablehlo").stat().st_size for m in (None, 0)}
    assert sizes[None] > sizes[0]
    assert main.main(["export", str(workdir), "--to=stablehlo", "--merge=1.5"]) == 2
    assert "merge 1.5: give a whole number" in capsys.readouterr().err

    out = tmp_path / "timm"
    assert main.main(["convert", str(workdir), f"--out={out}", "--to=timm"]) == 0
    assert "note: timm merges no tokens" in capsys.readouterr().out
    assert load(out).model.merge == 1

    with pytest.raises(UserError, match="holds a run of another config"):
        train.run(load_config(str(workdir / "config.json"), {"model.merge": "2"}), workdir)
