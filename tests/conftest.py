"""Flags for every test: 8 virtual CPU devices, rank promotion raises, and code that compiles fast.

The tests compile thousands of tiny programs and run each a few times, so machine code that is not
optimized costs a third of the time. The programs themselves, their fusions, memory and counted
FLOPs are those of any run. What XLA_FLAGS says already has the last word.
"""

import os

os.environ["XLA_FLAGS"] = " ".join(
    (
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",  # the short way from a fusion to LLVM
        "--xla_cpu_parallel_codegen_split_count=1",
        os.environ.get("XLA_FLAGS", ""),
    )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption("--every-cell", action="store_true", help="of tests/test_composition.py")


def pytest_configure(config):
    """What one test compiles, others and other workers load: most of the time went there."""
    if not hasattr(config, "cache"):  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
