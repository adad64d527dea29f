"""Compiled programs kept on disk, and freed memory kept for the next step."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from vision_jax import machine
from vision_jax.trees.products import convolution

COMPILE = """
import json
from vision_jax import machine
folder = machine.keep_compiled()
import jax, jax.monitoring, numpy
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x @ x + 1)(numpy.ones((3, 3), numpy.float32))
print(json.dumps([str(folder), sum(name.endswith("cache_hits") for name in seen)]))
"""
STEPS = """
import resource
import sys
from vision_jax import machine
kept = None if sys.argv[1] == "leave" else machine.keep_memory(one_heap=sys.argv[1] == "one heap")
import jax
step = jax.jit(lambda x: (x @ x.T) @ x)  # 64 MB of temporaries
x = jax.numpy.ones((4096, 64))
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(kept, min(faults))
"""

PEAK = """
import pathlib
from vision_jax import machine
assert machine.keep_memory()
import jax, jax.monitoring
programs = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: programs.append(event) if "backend_compile" in event else None
)
def step(state, batch):
    square = jax.numpy.sqrt(batch @ batch.T)  # 64 MB of temporaries
    weights = {name: x + (square @ batch)[:256, :16] for name, x in state.items()}
    return weights, sum(x.sum() for x in weights.values())
def held(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
state = jax.device_put({str(i): jax.numpy.ones((256, 16)) for i in range(100)}, jax.devices()[0])
batches = [jax.numpy.ones((rows, 64)) for rows in (4096, 4095)]
program = machine.jit(step, donate_argnums=0)
temporary = program.lower(state, batches[0]).compile().memory_analysis().temp_size_in_bytes // 1024
call, before = machine.compile_apart(program), held("VmRSS")
programs.clear()
for i in range(30):
    state, total = call(state, batches[i // 15])
    float(total)
print(temporary, held("VmHWM") - before, len(programs))
"""


def run(code, *arguments, **environment):
    unset = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**kept, "JAX_PLATFORMS": "cpu", **environment},
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.long
def test_a_program_is_compiled_once_for_all_processes(tmp_path):
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    folder, hits = json.loads(run(COMPILE, **cache))
    assert hits == 0
    assert folder.startswith(str(tmp_path / "vision_jax"))
    assert json.loads(run(COMPILE, **cache)) == [folder, 1]


@pytest.mark.long
def test_a_program_that_was_half_written_is_written_again(tmp_path):
    """A killed process leaves one; JAX by itself reads it in each run, warns and compiles anew."""
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    folder, _ = json.loads(run(COMPILE, **cache))
    (program,) = (tmp_path / "vision_jax").rglob("*-cache")
    program.write_bytes(program.read_bytes()[:100])
    program.with_name(program.name.removesuffix("-cache") + "-atime").unlink()
    assert json.loads(run(COMPILE, **cache)) == [folder, 0]
    assert json.loads(run(COMPILE, **cache)) == [folder, 1]


@pytest.mark.long
def test_a_user_without_a_name_has_a_cache(tmp_path):
    """As in a container that is given a number for its user; JAX bounds no cache for such a one."""
    nameless = """
import pwd
def getpwuid(uid):
    raise KeyError(uid)
pwd.getpwuid = getpwuid
"""
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    another = "jax.jit(lambda x: x @ x + 2)(numpy.ones((3, 3), numpy.float32))\n"
    before, _, after = COMPILE.rpartition("print")
    code = f"{nameless}{before}{another}print{after}"
    folder, hits = json.loads(run(code, **cache))
    assert hits == 0
    assert json.loads(run(code, **cache)) == [folder, 2]


@pytest.mark.long
def test_the_users_own_cache_comes_first(tmp_path):
    found = json.loads(run(COMPILE, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own")))
    assert found == ["None", 0]


@pytest.mark.long
@pytest.mark.skipif(machine._glibc() is None, reason="Linux with glibc")
@pytest.mark.parametrize("heaps", ["one heap", "its own heaps"])
def test_a_step_computes_in_the_memory_of_the_one_before(heaps):
    kept, faults = run(STEPS, heaps).split()
    plain = int(run(STEPS, "leave").split()[1])
    assert kept == "True"
    assert plain > 8_000  # pages of the temporaries
    assert int(faults) < plain / 20


@pytest.mark.long
@pytest.mark.skipif(machine._glibc() is None, reason="Linux with glibc")
def test_steps_have_one_place_and_compile_once():
    """Also where a program is compiled for other shapes."""
    temporary, peak, programs = map(int, run(PEAK).split())
    assert temporary > 16_000  # KiB
    assert peak < 1.5 * temporary
    assert programs == 1


@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "2"}, {"JAX_PLATFORMS": "cuda,cpu"}], ids=" ".join
)
def test_other_devices_and_the_users_own_allocator_are_left_alone(environment):
    code = "from vision_jax import machine; print(machine.keep_memory())"
    assert run(code, **environment) == "False"


def test_memory_is_given_back_when_it_grows_and_not_for_what_stays(monkeypatch):
    held, freed, given = [100], [100], []
    monkeypatch.setattr(machine, "_resident_bytes", lambda: held[0])
    monkeypatch.setattr(
        machine, "give_back_memory", lambda: (given.append(held[0]), held.__setitem__(0, freed[0]))
    )
    watch = machine.MemoryWatch()
    watch.check()
    held[0] = 125
    watch.check()
    assert given == []
    held[0], freed[:] = 170, [110]
    watch.check()
    assert given == [170]
    held[0], freed[:] = 180, [175]  # it is needed
    watch.check()
    watch.check()
    assert given == [170, 180]


def test_a_program_keeps_less_at_a_time_and_computes_the_same(rng):
    """What each tap of a kernel sees of the images is needed by the kernel's gradient alone."""

    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(convolution((3, 3), (1, 1), ((1, 1), (1, 1)))(x, kernel))
        return (x**2).sum()

    kernels = rng.normal(0, 0.1, (4, 3, 3, 16, 16)).astype(np.float32)
    x = rng.normal(size=(2, 20, 20, 16)).astype(np.float32)
    plain, ours = (
        jit(jax.grad(loss)).lower(kernels, x).compile() for jit in (jax.jit, machine.jit)
    )
    before, now = (one.memory_analysis().temp_size_in_bytes for one in (plain, ours))
    assert now < before / 2
    np.testing.assert_array_equal(ours(kernels, x), plain(kernels, x))


def test_a_version_of_xla_without_the_option_compiles_as_it_is(monkeypatch):
    compiled = []

    def jit(function, compiler_options=None, **keywords):
        compiled.append(compiler_options)
        renamed = compiler_options and {
            f"{name}_renamed": x for name, x in compiler_options.items()
        }
        return plain(function, compiler_options=renamed, **keywords)

    plain = jax.jit
    monkeypatch.setattr(jax, "jit", jit)
    machine._in_order.cache_clear()
    try:
        assert machine.jit(jnp.square)(3.0) == 9.0
    finally:
        machine._in_order.cache_clear()
    probed, used = compiled
    assert probed is not None
    assert used is None
