"""A QLoRA run whole: what is frozen, what is saved, what is merged, what it takes."""

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file

from vision_jax import convert, figures, train
from vision_jax.errors import UserError
from vision_jax.memory import device_bytes
from vision_jax.run.restore import restore
from vision_jax.trees import lora, paths, quantize

QLORA = {"recipes": "('quantize', 'lora')"}


@pytest.mark.long
def test_a_run_keeps_its_base_and_merges_into_its_float_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: None)
    config = runs.full_config(**QLORA)
    stopped = config.copy_and_resolve_references()
    stopped.total_steps = 4
    stopped.optim.schedule = config.optim.schedule = "constant"
    assert train.run(stopped, tmp_path / "parts") == 0
    assert train.run(config, tmp_path / "parts") == 0  # goes on
    assert train.run(config, tmp_path / "whole") == 0
    parts, whole = (restore(config, tmp_path / name, "last") for name in ("parts", "whole"))
    jax.tree.map(np.testing.assert_array_equal, parts.state, whole.state)

    first = runs.Prepared(config=config)
    assert {str(x.dtype) for x in first.frozen.values()} == {"uint8", "float32"}
    assert parts.frozen.keys() == first.frozen.keys()
    for path, array in first.frozen.items():
        np.testing.assert_array_equal(parts.frozen[path], array, err_msg=path)

    trained, frozen = parts.trained.arguments[:2]
    params = parts.run.parameters.assemble({**trained, **frozen})
    base, adapters = lora.detach(params)
    kernel = "block_0/mlp/fc1/kernel"
    update = adapters[kernel].scale * np.asarray(adapters[kernel].a @ adapters[kernel].b)
    expected = np.asarray(paths.flatten(lora.merge(base))[kernel]) + update
    assert np.abs(update).max() > 1e-4
    saved = load_file(tmp_path / "parts" / "model.safetensors")["blocks.0.mlp.fc1.weight"].T
    np.testing.assert_allclose(saved, expected, rtol=1e-5, atol=1e-6)
    weights = convert.read_weights(str(tmp_path / "parts"))
    assert {array.dtype for array in weights.tensors.values()} == {np.dtype(np.float32)}


def test_the_plan_counts_the_bytes_of_the_formula():
    config = runs.tiny_config(**QLORA)
    run = runs.Prepared(config=config).run
    trainable, frozen = run.parameters.abstract()
    plain = runs.Prepared(config=runs.tiny_config(recipes="()", trainable=".*"))
    kernels = {p: x for p, x in plain.state.trainable.items() if f"{p}/base/codes" in frozen}
    assert len(kernels) == 4
    saved = sum(x.nbytes for x in kernels.values()) - sum(
        quantize.kernel_bytes(x.shape, "nf4") for x in kernels.values()
    )
    whole = sum(x.nbytes for path, x in plain.state.trainable.items() if "head" not in path)
    sizes = [device_bytes(tree) for tree in (frozen, run.abstract_state.opt_state)]
    assert sizes[0] == whole - saved
    adam = 2 * sum(x.size * 4 for x in trainable.values())
    assert adam <= sizes[1] <= adam + 64  # and its counters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantize__train": True}, "set config.quantize.form=int8"),
        ({"quantize__activations": "int8"}, "set config.quantize.form=int8"),
        ({"quantize__form": "int8", "quantize__train": True}, "take one of both"),
        ({"recipes": "('lora', 'quantize')"}, r"write \('quantize', 'lora'\)"),
    ],
)
def test_what_does_not_go_together(fields, message):
    with pytest.raises(UserError, match=message):
        runs.tiny_config(**(QLORA | fields))
