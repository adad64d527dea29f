"""A program that runs a training command of one of several processes, and has one of them fail.

    python tests/hosts/faults.py FAULT VICTIM --config=... --coordinator=... --process=...

VICTIM is the number of the process that fails; the others run as they are.
"""

import os
import resource
import signal
import sys
import threading
import time

import numpy as np

from vision_jax import figures, main
from vision_jax.tasks.classification import figures as predictions

AT = 4  # the step at which it happens


def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def note():
    """When it happens first; whole, if the process is killed meanwhile."""
    path = os.environ["FAULT_FILE"]
    if not os.path.exists(path):
        with open(f"{path}.{threading.get_ident()}", "w") as file:
            file.write(str(time.time()))
        os.replace(file.name, path)


def before(owner, name, act, call=1):
    """`owner.name` calls `act()` first, at its `call`-th call."""
    original, calls = getattr(owner, name), []

    def patched(*arguments, **keywords):
        calls.append(None)
        if len(calls) == call:
            note()
            act()
        return original(*arguments, **keywords)

    setattr(owner, name, patched)


def in_batches(act):
    """`act()` while the batch of a step is made."""
    from vision_jax.data import pipeline

    before(pipeline.CountDamaged, "__call__", act, AT)


def in_step(act):
    from vision_jax import processes

    original = processes.at

    def at(step, phase):
        original(step, phase)
        if (step, phase) == (AT, processes.STEP):
            note()
            act()

    processes.at = at


def in_the_middle(act):
    """Out of a thread, while the main one computes or waits."""
    in_step(lambda: threading.Timer(0.05, act).start())


def between_steps(act):
    from vision_jax import train

    before(train._Reporter, "__call__", act, AT)


def raises(error):
    def act():
        raise error

    return act


def damage():
    """No image can be read any more."""
    from vision_jax.data import pipeline
    from vision_jax.data.decode import DamagedImageError

    def broken(self, row, rng):
        note()
        return None, [pipeline.Damaged(row, f"image {row}", str(DamagedImageError("it is gone")))]

    pipeline._LoadForTraining.__call__ = broken


def full():
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, resource.RLIM_INFINITY))


def spoil_parameters(change):
    """This process's copy of a frozen array becomes another one."""
    import jax

    from vision_jax import train

    make = train._make_program

    def spoiled(prepared, facts, begin):
        frozen = dict(begin.frozen)
        name = next(name for name in sorted(frozen) if name.endswith("norm1/bias"))
        array = frozen[name]
        parts = [
            jax.device_put(change(np.array(p.data)), p.device) for p in array.addressable_shards
        ]
        frozen[name] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, parts)
        program = make(prepared, facts, begin)
        original, calls = program.train_step, []

        def train_step(state, batch):
            calls.append(None)
            if len(calls) == AT:
                note()
                program.fixed[name] = frozen[name]
            return original(state, batch)

        import dataclasses

        return dataclasses.replace(program, train_step=train_step)

    train._make_program = spoiled


def flip(array):
    array.view(np.uint8).reshape(-1)[0] ^= 1
    return array


def slow_to_read():
    """This process reads what all agree on a second after the others, at its end."""
    from vision_jax import processes

    first_failure, store = processes.first_failure, processes._store

    class Slow:
        def __init__(self, client):
            self.client = client

        def __getattr__(self, name):
            return getattr(self.client, name)

        def blocking_key_value_get(self, *arguments):
            time.sleep(2)
            return self.client.blocking_key_value_get(*arguments)

    def at_end(text):
        processes._store = lambda: Slow(store())
        return first_failure(text)

    end = processes.end

    def slow_end(*arguments):
        processes.first_failure = at_end
        end(*arguments)

    processes.end = slow_end


def spoil(fault):
    from vision_jax import checkpoints, processes, train

    if fault == "killed before it joins":
        before(processes, "connect", die)
    elif fault == "killed before its first step":
        before(train, "_make_program", die)
    elif fault == "killed reading data":
        in_batches(die)
    elif fault == "killed in a step":
        in_the_middle(die)
    elif fault == "killed evaluating":
        before(train, "_report_evaluation", die)
    elif fault == "killed saving":
        before(
            checkpoints.ocp.CheckpointManager, "save", lambda: threading.Timer(0.02, die).start(), 2
        )
    elif fault == "killed writing results":
        before(train, "write_results", die)
    elif fault == "segmentation fault":
        in_the_middle(lambda: die(signal.SIGSEGV))
    elif fault == "aborts":
        in_step(os.abort)
    elif fault == "stopped":
        in_the_middle(lambda: die(signal.SIGSTOP))
    elif fault == "its supervisor is killed":
        in_the_middle(lambda: os.kill(os.getppid(), signal.SIGKILL))
    elif fault == "its supervisor is stopped":
        in_the_middle(lambda: os.kill(os.getppid(), signal.SIGSTOP))
    elif fault == "slow data":
        in_batches(lambda: time.sleep(1000))
    elif fault == "slow between steps":
        between_steps(lambda: time.sleep(1000))
    elif fault == "raises in data":
        in_batches(raises(RuntimeError("the reader broke")))
    elif fault == "raises between steps":
        between_steps(raises(KeyError("no such thing")))
    elif fault == "out of memory":
        between_steps(raises(MemoryError("cannot allocate 3 GiB")))
    elif fault == "unreadable data":
        damage()
    elif fault == "full disk":
        before(checkpoints.ocp.CheckpointManager, "save", full, 2)
    elif fault == "not finite":
        spoil_parameters(lambda array: array * np.nan)
    elif fault == "another copy":
        spoil_parameters(flip)
    elif fault == "exits":
        between_steps(lambda: os._exit(0))
    elif fault == "asked to end":
        between_steps(lambda: os.kill(os.getppid(), signal.SIGTERM))
    elif fault == "asked to end, and slow to read that all will":
        between_steps(lambda: os.kill(os.getppid(), signal.SIGTERM))
        slow_to_read()
    elif fault == "waits for a test":
        in_step(lambda: time.sleep(3))
    elif fault == "other packages":
        versions = processes.version
        processes.version = lambda name: "9.9" if name == "optax" else versions(name)
    elif fault == "other code":
        processes.check_equal.__globals__["platform"].python_version = lambda: "9.9.9"
    else:
        assert fault == "nothing", fault


if __name__ == "__main__":
    fault, victim = sys.argv[1:3]
    del sys.argv[1:3]
    if f"--process={victim}" in sys.argv:
        spoil(fault)
    for module in (figures, predictions):  # slow, and not what this is about
        module.save_figure = lambda figure, path: path.touch()
    main.command()
