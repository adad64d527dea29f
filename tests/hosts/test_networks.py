"""Faults of a network that the loopback has not: cables that are pulled, and packets that are lost.

Each machine is a namespace with an address and a name of its own; networks.py makes them.
"""

import re
import sys
import time

import pytest
import runs
from clusters import Cluster, flags, free_port
from networks import address, make_network, possible
from test_faults import LIMIT, PROGRAM, STEPS
from test_train import tensors

from vision_jax.hosts.judge import LOST

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux" or not possible(), reason="needs namespaces"),
]

COUNT = 3


def start(network, workdir, environment, fault="nothing", victim=1):
    fields = runs.overrides(**runs.FULL, hosts__compare_every=2) | STEPS | {"batch_size": "24"}
    port = free_port()
    commands = [
        [
            *(PROGRAM, fault, victim, f"--config={runs.ROOT / 'configs/vit_lora.py'}"),
            *(f"--workdir={workdir}", *(f"--config.{n}={value}" for n, value in fields.items())),
            *flags(process, COUNT, port, address(0)),
        ]
        for process in range(COUNT)
    ]
    before = [network.enter(process) for process in range(COUNT)]
    return Cluster(commands, before=before, environment=environment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("network") / "whole"
    with make_network(COUNT) as network, start(network, workdir, {}) as cluster:
        assert cluster.wait(300) == [0] * COUNT, cluster.screens()
    return workdir


NO_SIGN = r"process {} \(h{}\) is lost: no sign of life for \d+ s; "
# What happens to the network: (what is done to it, what each process says)
FAULTS = {
    "a machine is cut off": (
        lambda network: network.cut(1),
        [NO_SIGN.format(1, 1), r"process 0 \(\S+\) is lost: no sign of life", NO_SIGN.format(1, 1)],
    ),
    "the first machine is cut off": (
        lambda network: network.cut(0),
        [r"process [12] \(h[12]\) is lost: no sign", *2 * [r"process 0 \(\S+\) is lost: no sign"]],
    ),
    "what a machine sends to the first is lost": (
        lambda network: network.mute(1, 0),
        # Without its acknowledgements nothing new comes from there either.
        [NO_SIGN.format(1, 1), r"process [01] \(\S+\) is lost: no sign", NO_SIGN.format(1, 1)],
    ),
    "what the first machine sends to another is lost": (
        lambda network: network.mute(0, 1),
        [r"process 1 \(h1\) is", r"process 0 \(\S+\) is lost: no sign", r"process 1 \(h1\) is"],
    ),
    "two machines don't reach each other": (
        lambda network: (network.mute(1, 2), network.mute(2, 1)),
        3 * [r"all processes wait for each other for \d+ s, .*the network hangs"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_machine_names_what_the_network_lost(fault, whole, tmp_path):
    act, words = FAULTS[fault]
    workdir, at = tmp_path / "run", tmp_path / "at"
    with (
        make_network(COUNT) as network,
        start(network, workdir, {"FAULT_FILE": str(at)}, "waits for a test") as cluster,
    ):
        cluster.wait_until(at.exists)
        act(network)
        began = time.monotonic()
        codes = cluster.wait(LIMIT)
        took, screens = time.monotonic() - began, cluster.screens()
        print(f"{fault}: all have ended {took:.1f} s later", [cluster.errors(n) for n in range(3)])
        assert codes == [LOST] * COUNT, screens
        for process in range(COUNT):
            (line,) = cluster.errors(process)
            assert re.search(words[process], line), line
            assert "Traceback" not in screens[process][1]
        assert cluster.no_orphans(10), cluster.living()
    with make_network(COUNT) as network, start(network, workdir, {}) as cluster:
        assert cluster.wait(300) == [0] * COUNT, cluster.screens()
    assert tensors(workdir) == tensors(whole)


def test_a_network_that_fails_for_seconds_ends_nothing(whole, tmp_path):
    """All that is sent is lost for two seconds, then for four."""
    workdir, at = tmp_path / "run", tmp_path / "at"
    with (
        make_network(COUNT) as network,
        start(network, workdir, {"FAULT_FILE": str(at)}, "waits for a test") as cluster,
    ):
        cluster.wait_until(at.exists)
        for seconds in (2, 4):
            for machine in range(COUNT):
                network.cut(machine)
            time.sleep(seconds)
            for machine in range(COUNT):
                network.mend(machine)
            time.sleep(1)
        assert cluster.wait(300) == [0] * COUNT, cluster.screens()
    assert tensors(workdir) == tensors(whole)
