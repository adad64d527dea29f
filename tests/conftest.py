"""What holds for every test: 8 virtual CPU devices, rank promotion raises, one printed seed.

    pytest                   in minutes: one of each kind
    pytest --all             the long tests too: every family, recipe and cell
    pytest --all --part 2/4  of those and of tests/parity each fourth, from the second on
    pytest --seed 1234       the draws of the run that printed this seed

The tests compile thousands of tiny programs and run each a few times, so machine code that is not
optimized costs a third of the time. The programs themselves, their fusions, memory and counted
FLOPs are those of any run. What XLA_FLAGS says already has the last word. With USUAL_XLA_FLAGS in
the environment the code is what users run: .ci/run does so where results are bit-identical.
"""

import functools
import gc
import os
import secrets
import unittest.mock
import zlib
from importlib.metadata import version
from pathlib import Path

import pytest

os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        *(
            ()
            if "USUAL_XLA_FLAGS" in os.environ
            else (
                "--xla_backend_optimization_level=0",
                "--xla_llvm_disable_expensive_passes=true",
                # The short way from a fusion to LLVM; from jaxlib 0.11.2 on XLA ends at the name.
                *(
                    ("--xla_cpu_use_fusion_emitters=false",)
                    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
                    else ()
                ),
                "--xla_cpu_parallel_codegen_split_count=1",
            )
        ),
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

# What the person's terminal is says nothing about what is tested.
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="the tests marked `long` too")
    parser.addoption(
        "--part", default="1/1", help="2/4: of the long tests each fourth from the second on"
    )
    parser.addoption("--seed", type=int, help="of every random draw; a run prints its own")


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "long(but=()): takes its time, but for these cases; only with --all"
    )
    config.addinivalue_line("markers", "hours: so long that .ci/run leaves it out of --all")
    if hasattr(config, "workerinput"):  # of xdist
        config.option.seed = config.workerinput["seed"]
    elif config.option.seed is None:
        config.option.seed = secrets.randbelow(2**32)
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    # What one test compiles, others, other workers and commands load: most of the time went there.
    for name, value in (
        ("jax_compilation_cache_dir", str(config.cache.mkdir("xla"))),
        ("jax_persistent_cache_min_compile_time_secs", 0.5),
    ):
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.option.seed


def is_long(item):
    """If one of its marks says so: of the test, or of this case of it."""
    case = item.callspec.id if hasattr(item, "callspec") else None
    return any(case not in mark.kwargs.get("but", ()) for mark in item.iter_markers("long"))


def pytest_collection_modifyitems(config, items):
    if not config.option.all:
        for item in filter(is_long, items):
            item.add_marker(pytest.mark.skip(reason="long: with --all"))
    first, step = map(int, config.option.part.split("/"))
    many = [item for item in items if is_long(item) or "parity" in item.path.parts]
    left_out = set(many) - set(many[first - 1 :: step])
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def same_environment():
    """What a test, or a command that it calls, sets in the environment ends with it.

    A runtime of exported files sets XLA_FLAGS for its process; children of later tests had one
    device each.
    """
    with unittest.mock.patch.dict(os.environ):
        yield


def pytest_collection_finish():
    """What is imported and collected stays: to look through it again and again took a tenth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


# Where a promotion of dtypes must be written out.
STRICT = ("attacks", "models", "ops", "recipes", "tasks", "trees", "test_optim.py", "test_steps.py")


@pytest.fixture(autouse=True, scope="module")
def strict_dtypes(request):
    """A mask times floats, or float32 with bfloat16, raises: whoever means it writes the dtype.

    What is at least float32 is `np.promote_types(dtype, np.float32)`; jnp's refuses here too.
    Three functions of libraries promote on their own and still may: the statistics and the scaling
    of flax's norms, where activations are not float32, and the bias correction of optax's Adam,
    which takes a float to the power of an integer.
    """
    if request.path.relative_to(Path(__file__).parent).parts[0] not in STRICT:
        yield
        return
    import flax.linen.normalization
    import optax

    def lenient(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            with jax.numpy_dtype_promotion("standard"):
                return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("strict"):
        for module, name in (
            (flax.linen.normalization, "_compute_stats"),
            (flax.linen.normalization, "_normalize"),
            (optax.tree, "bias_correction"),
        ):
            patch.setattr(module, name, lenient(getattr(module, name)))
        yield


@pytest.fixture
def rng(request):
    """Draws of this test's own, by the printed seed and the test's name."""
    name = zlib.crc32(request.node.nodeid.encode())
    return np.random.default_rng([request.config.option.seed, name])


def pytest_terminal_summary(terminalreporter, config):
    terminalreporter.write_line(f"random draws: pytest --seed {config.option.seed} repeats them")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and "rng" in item.fixturenames:
        again = f'pytest "{item.nodeid}" --seed {item.config.option.seed}'
        report.sections.append(("draws as in this run", again))
    return report
