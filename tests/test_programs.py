"""What tests/programs.py measures; the configs' own figures are checked in tests/test_plan.py."""

import json

import jax
import numpy as np
import programs
import pytest
from jax.sharding import Mesh
from test_configs import CONFIGS, small

from vision_jax.commands import plan
from vision_jax.run.prepare import prepare

ONE = "vit_lora, one device"


@pytest.mark.long
def test_the_program_of_several_images_a_device():
    """With one image each, as tests of 8 devices have it, no product has two axes of rows."""
    (path,) = (path for path in CONFIGS if path.stem == "vit_lora")
    config = small(path)
    config.batch_size = 4
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    run = prepare(config, description=plan.describe_planned(config)[0], mesh=mesh)
    state, (_, frozen) = run.abstract_state, run.parameters.abstract()
    lowered = run.make_train_step().lower(state, frozen, run.abstract_batch())
    programs.check(ONE, lowered.compile())


def test_the_figures_are_of_programs_that_there_are():
    figures = set(json.loads(programs.GOLDEN.read_text()))
    assert figures <= {ONE, *(path.stem for path in CONFIGS)}
    assert {ONE, "vit_lora", "vit_lora_pgd"} <= figures


def test_copies_of_a_program_are_counted():
    text = """
%fused (p: f32[2,3]) -> f32[3,2] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %t = f32[3,2]{1,0} transpose(%p), dimensions={1,0}
}
%other (p: f32[3,2]) -> f32[3,2] {
  %p = f32[3,2]{1,0} parameter(0)
  %t = f32[3,2]{1,0} copy(%p)
  ROOT %n = f32[3,2]{1,0} negate(%t)
}
ENTRY %main (x: f32[2,3]) -> f32[3,2] {
  %x = f32[2,3]{1,0} parameter(0)
  %c = f32[2,3]{1,0} copy(%x)
  %f = f32[3,2]{1,0} fusion(%c), kind=kLoop, calls=%fused
  ROOT %g = f32[3,2]{1,0} fusion(%f), kind=kLoop, calls=%other
}
"""
    assert programs.copies(text) == 2
