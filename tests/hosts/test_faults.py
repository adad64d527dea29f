"""Faults of one process in training runs of two to four: each is named by all others within 60 s.

Every run is resumed afterwards where it can be, and ends with the bits of one without a fault.
tests/hosts/faults.py is the program.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
from clusters import Cluster, flags, free_port
from test_train import tensors

from vision_jax.hosts.judge import BAD, LOST

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
]

PROGRAM = Path(__file__).with_name("faults.py")
LIMIT = 60.0  # seconds
STEPS = {"total_steps": "8", "checkpoint_every": "2", "evaluate.every": "4", "log_every": "1"}
PEERS = r"process {v} \(\S+\) "  # whose failure it is
AT_STEP = r"process {v} \(\S+, step \d+\): "

# The fault: (which process's, of how many, exit code, what the line says, what else is set)
FAULTS = {
    "killed before it joins": (1, 2, LOST, PEERS + "was killed by SIGKILL", {}),
    "killed before its first step": (1, 2, LOST, PEERS + "was killed by SIGKILL", {}),
    "killed reading data": (1, 2, LOST, PEERS + "was killed by SIGKILL.* at step 4", {}),
    "killed in a step": (0, 2, LOST, PEERS + "was killed by SIGKILL.* at step 4", {}),
    "killed evaluating": (1, 2, LOST, PEERS + "was killed by SIGKILL.* at step 4, eval", {}),
    "killed saving": (0, 2, LOST, PEERS + "was killed by SIGKILL", {}),
    "killed writing results": (0, 2, LOST, PEERS + "was killed by SIGKILL.*writing res", {}),
    "segmentation fault": (1, 2, LOST, PEERS + "was killed by SIGSEGV", {}),
    "aborts": (1, 2, LOST, "process {v} .*SIGABRT", {}),
    "stopped": (1, 3, LOST, PEERS + r"is stopped \(SIGSTOP\) since \d+ s; .* at step 4", {}),
    "its supervisor is killed": (1, 2, LOST, PEERS + "is lost: its connection closed", {}),
    "its supervisor is stopped": (1, 2, LOST, PEERS + "is lost: no sign of life|SIG", {}),
    "slow data": (1, 3, LOST, PEERS + r"is slow: the others wait for \d+ s, .*reading data", {}),
    "slow between steps": (0, 2, LOST, PEERS + r"is slow: the others wait for \d+ s, ", {}),
    "raises in data": (1, 2, 1, AT_STEP + "RuntimeError: the reader broke", {}),
    "raises between steps": (1, 2, 1, AT_STEP + "KeyError: 'no such thing'", {}),
    "out of memory": (1, 2, 1, AT_STEP + "MemoryError: cannot allocate 3 GiB", {}),
    "unreadable data": (1, 2, None, "process {v} .* images were found damaged", {}),
    "full disk": (0, 2, LOST, AT_STEP + "cannot write .*File too large", {}),
    "not finite": (1, 3, LOST, PEERS + "holds another frozen/.*norm1/bias", {}),
    "another copy": (1, 3, LOST, PEERS + "holds another frozen/.*norm1/bias", {}),
    "exits": (1, 2, None, "process {v} ", {}),
    "asked to end": (1, 2, 143, "", {}),
    "asked to end, and slow to read that all will": (1, 2, 143, "", {}),
    "other packages": (1, 2, BAD, PEERS + r"has another installation .* optax is '9.9' and", {}),
    "other code": (1, 2, BAD, PEERS + r"has another installation .* Python is '9.9.9' and", {}),
    "other rate": (1, 2, BAD, PEERS + "has another config .*optim.lr is 0.5", {"optim.lr": "0.5"}),
    "fewer examples": (1, 2, BAD, PEERS + "has another data.*number of examples is 40", "fewer"),
    "other classes": (1, 2, BAD, PEERS + "has another data.*class names is", "classes"),
    "other order": (1, 2, BAD, PEERS + "has another data.*data.train: (sizes|annot)", "order"),
    "other weights": (1, 2, BAD, PEERS + "has another .*sha256 is", "weights"),
}


@pytest.fixture(scope="module")
def fields():
    found = runs.overrides(**runs.FULL, hosts__compare_every=2)
    return {**found, **STEPS, "data.max_damaged": "0.5"}


def commands(fault, victim, count, workdir, fields, more=()):
    port = free_port()
    if count == 3:
        fields = {**fields, "batch_size": "24"}
    return [
        [
            *(PROGRAM, fault if fault in known() else "nothing", victim),
            *(f"--config={runs.ROOT / 'configs/vit_lora.py'}", f"--workdir={workdir}"),
            *(f"--config.{name}={value}" for name, value in fields.items()),
            *(more if process == victim else ()),
            *flags(process, count, port),
        ]
        for process in range(count)
    ]


def known():
    return set(re.findall(r'fault == "([^"]+)"', PROGRAM.read_text()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fields):
    """The run without a fault, on two processes and on three."""
    folder = tmp_path_factory.mktemp("whole")
    for count in (2, 3):
        with Cluster(commands("nothing", 0, count, folder / str(count), fields)) as cluster:
            assert cluster.wait(300) == [0] * count, cluster.screens()
    return folder


def other_input(kind, folder):
    """(the file of all, another one): data or weights that are not those of the others."""
    if kind == "weights":
        other = folder / "weights.safetensors"
        shutil.copy(runs.inputs() / other.name, other)
        with other.open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        return runs.inputs() / other.name, other
    with np.load(runs.inputs() / "cifar10.npz") as file:
        arrays = dict(file)
    if kind == "fewer":
        arrays |= {f"train_{name}": arrays[f"train_{name}"][:40] for name in ("images", "labels")}
    elif kind == "classes":
        arrays["class_names"] = arrays["class_names"][::-1]
    else:
        arrays |= {f"train_{name}": arrays[f"train_{name}"][::-1] for name in ("images", "labels")}
    np.savez(folder / "cifar10.npz", **arrays)
    return runs.inputs() / "cifar10.npz", folder / "cifar10.npz"


@pytest.mark.parametrize("fault", FAULTS)
def test_each_process_names_the_fault_and_the_run_resumes(fault, fields, whole, tmp_path):
    victim, count, code, words, more = FAULTS[fault]
    own, before, environment = [], (), {"FAULT_FILE": str(tmp_path / "at")}
    if isinstance(more, dict):
        own = [f"--config.{name}={value}" for name, value in more.items()]
    else:  # the same path, another file: as on another machine
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("needs mount namespaces")
        there, other = other_input(more, tmp_path)
        bind = 'mount --bind "$1" "$2"; shift 2; exec "$@"'
        before = [[]] * count
        before[victim] = ["unshare", "--mount", "sh", "-c", bind, "-", str(other), str(there)]
    started = commands(fault, victim, count, tmp_path / "run", fields, own)
    with Cluster(started, before=before, environment=environment) as cluster:
        dead = victim if "supervisor is" in fault else None
        codes = cluster.wait(300, but=[] if dead is None else [dead])
        ended = time.time()
        screens = cluster.screens()
        if fault == "its supervisor is stopped":
            os.kill(cluster.children[victim].pid, 18)
            codes = cluster.wait(20)
        assert cluster.no_orphans(10), cluster.living()
        for process in range(count):
            if process != dead:
                assert codes[process] not in (None, 0), screens
                assert code is None or codes[process] == code, screens
                lines = cluster.errors(process)
                assert len(lines) == (1 if words else 0), screens
                for line in lines:
                    assert re.search(words.format(v=victim), line), line
                errors = screens[process][1]
                assert process == victim or "Traceback" not in errors, errors
                assert not re.search(r"^F\d{4}|Check failure", errors, re.M), errors
    if (tmp_path / "at").exists():
        took = ended - float((tmp_path / "at").read_text())
        print(f"{fault}: all have ended {took:.1f} s later")
        assert took < LIMIT
    if codes[0] == BAD:
        assert not (tmp_path / "run" / "checkpoints").exists()
        return
    with Cluster(commands("nothing", 0, count, tmp_path / "run", fields)) as cluster:
        assert cluster.wait(300) == [0] * count, cluster.screens()
    assert tensors(tmp_path / "run") == tensors(whole / str(count))
    kept = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert kept == sorted(path.name for path in (whole / str(count)).iterdir())
