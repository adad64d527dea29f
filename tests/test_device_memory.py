"""What a step takes is said before it runs, and too small a device is answered in one line."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest
import runs

from vision_jax import flags, machine, main, memory, steps, train
from vision_jax.logging import human_size

XLA = {
    "RESOURCE_EXHAUSTED: Out of memory allocating 14400000000 bytes.": "13.4 GiB",
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12.50GiB.\n  a page": "12.5 GiB",
    "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.48G": "20.0 GiB",
}


def exhausted(text):
    return jax.errors.JaxRuntimeError(text)


@pytest.mark.parametrize(("text", "size"), XLA.items())
def test_the_advice_is_one_line_of_what_the_config_can_change(text, size):
    values = {
        "batch_size": 64,
        "optim.accumulate": 2,
        "model.remat": False,
        "model.dtype": "float32",
        "mesh.fsdp": 1,
    }
    said = memory.advise(exhausted(text), values)
    assert said.startswith(f"not enough memory: {size} in one piece: try --config.batch_size=32, ")
    for part in ("accumulate=4", "remat=True", "dtype=bfloat16", "fsdp=-1", "plan --config"):
        assert part in said
    assert "\n" not in said
    thrifty = {"batch_size": 1, "model.remat": True, "model.dtype": "bfloat16", "mesh.fsdp": 8}
    assert "--config" not in memory.advise(exhausted(text), thrifty)


def test_other_errors_are_no_lack_of_memory():
    assert memory.is_out_of_memory(MemoryError())
    assert not memory.is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))
    assert not memory.is_out_of_memory(exhausted("INTERNAL: a bug"))
    cuda = "INTERNAL: Failed to load in-memory CUBIN: CUDA_ERROR_OUT_OF_MEMORY: out of memory"
    assert memory.is_out_of_memory(exhausted(cuda))


def test_main_answers_in_one_line(monkeypatch, capsys, tmp_path):
    def fails_with(text):
        def run(*arguments):
            raise exhausted(text)

        monkeypatch.setattr(train, "run", run)

    arguments = [f"--config={runs.ROOT / 'configs/vit_lora.py'}", f"--workdir={tmp_path}"]
    fails_with("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\n" + "x" * 9999)
    assert main.main(arguments) == main.BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("error: not enough memory: 8.0 GiB in one piece: try --config.batch_")
    assert said.count("\n") == 1
    fails_with("INTERNAL: a bug")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        main.main(arguments)


PROGRAMS = [name for name, command in main.COMMANDS.items() if ":" not in command.run]
PROGRAMS.remove("launch")  # starts another one


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_with_flags_of_their_own_answer_in_one_line(name, monkeypatch, capsys):
    """As if the first thing that each does were to call a program that is too large."""

    def parse_args(*_):
        raise exhausted("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.\n  a page")

    monkeypatch.setattr(flags.Parser, "parse_args", parse_args)
    assert main.main([name]) == main.BAD_INPUT
    said = capsys.readouterr().err
    smaller = main.COMMANDS[name].smaller or memory.SMALLER
    assert said == f"error: not enough memory: 8.0 GiB in one piece: try {smaller}\n"


def test_what_needs_less_memory_names_flags_that_there_are(capsys):
    for name in PROGRAMS:
        given = re.findall(r"--[a-z-]+", main.COMMANDS[name].smaller)
        assert main.main([name, "--help"]) == 0
        said = capsys.readouterr().out
        assert set(given) <= set(re.findall(r"--[a-z-]+", said)), name


CHILD = """
import resource, sys
import jax, jax.numpy as jnp
from vision_jax import main, train
square = jax.jit(lambda x: jnp.outer(x, x))
square(jnp.ones(8))
resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
train.run = lambda *_: jax.block_until_ready(square(jnp.ones(60000)))
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="address space has no limit elsewhere")
def test_a_real_lack_of_memory(tmp_path):
    child = runs.python(
        *("-c", CHILD, f"--config={runs.ROOT / 'configs/vit_lora.py'}", f"--workdir={tmp_path}"),
        "--no-kept-memory",
    )
    said = child.communicate(timeout=300)[1]
    assert child.returncode == main.BAD_INPUT, said
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "not enough memory: 13.4 GiB in one piece" in lines[0]


def test_what_is_reserved_is_said_once_before_the_first_run():
    said, one = [], jnp.ones((4, 8))
    state = steps.TrainState(jnp.zeros(()), {"a": one}, (one, one), {}, None)
    program = machine.jit(lambda x, batch: (x @ batch).sum())

    def tell(compiled, x, batch):
        said.append(memory.reserved(compiled, state, {"f": x}, batch))

    call = machine.compile_apart(program, tell)
    for columns in (64, 64, 32):
        call(jnp.ones((256, 512)), jnp.ones((512, columns)))
    assert len(said) == 1
    for part in ("trainable 128 B", "optimizer 256 B", "frozen 512.0 KiB", "batch 128.0 KiB"):
        assert part in said[0]
    assert "moving average" not in said[0]
    if (limit := memory.device_limit()) is not None:
        assert limit > 0
        assert " that are there: " in said[0]


def test_sharded_arrays_count_by_the_part_of_a_device():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert memory.device_bytes({"a": jax.device_put(jnp.ones((16, 4)), split)}) == 2 * 4 * 4
    assert human_size(32) == "32 B"
