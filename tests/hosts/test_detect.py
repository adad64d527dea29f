"""--coordinator=auto in the environments of clusters."""

import pytest

from vision_jax.errors import UserError
from vision_jax.hosts.detect import find_place, first_node
from vision_jax.hosts.link import split_address

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[003-004,7]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OMPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
URI = "prterun-a-host-1234@0.0;tcp4://10.96.0.1:34911"
OMPI5 = {name: value for name, value in OMPI.items() if "hnp" not in name}
OMPI5["PRTE_MCA_prte_hnp_uri"] = URI
JOBSET = {
    "JOBSET_NAME": "train",
    "REPLICATED_JOB_NAME": "workers",
    "JOB_COMPLETION_INDEX": "3",
    "PROCESSES": "4",
}


@pytest.mark.parametrize(
    ("environment", "coordinator", "processes", "process"),
    [
        (SLURM, "node003:62055", 3, 2),
        (OMPI, "10.96.0.1:", 4, 1),
        (OMPI5, "10.96.0.1:62674", 4, 1),
        ({**OMPI5, "PRTE_MCA_prte_hnp_uri": URI.replace("1234", "99")}, "10.96.0.1:61539", 4, 1),
        (JOBSET, "train-workers-0-0.train:8476", 4, 3),
        ({**JOBSET, "JOB_INDEX": "1", "PODS_A_JOB": "2", "JOB_COMPLETION_INDEX": "0"}, "", 4, 2),
        ({**SLURM, "JAX_COORDINATOR_PORT": "1234"}, "node003:1234", 3, 2),
        ({**OMPI, "JAX_COORDINATOR_ADDRESS": "h:5"}, "h:5", 4, 1),
    ],
)
def test_the_place_of_a_process(environment, coordinator, processes, process):
    place = find_place(environment)
    assert (place.processes, place.first) == (processes, process)
    assert place.coordinator.startswith(coordinator)
    host, port = split_address(place.coordinator)
    assert host
    assert 0 < port < 65536


@pytest.mark.parametrize(
    ("environment", "name"),
    [(SLURM, "slurm_cluster.SlurmCluster"), (OMPI, "ompi_cluster.OmpiCluster")],
)
def test_as_jax_finds_it(environment, name, monkeypatch):
    import importlib

    module, _, cluster = name.partition(".")
    jax_cluster = getattr(importlib.import_module(f"jax._src.clusters.{module}"), cluster)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert jax_cluster.is_env_present()
    place = find_place(environment)
    assert place.processes == jax_cluster.get_process_count()
    assert place.first == jax_cluster.get_process_id()
    assert place.coordinator == jax_cluster.get_coordinator_address(10, None)


def test_lists_of_nodes():
    lists = ("n1", "n1,n2", "n[1-4]", "n[07,9-11]", "gpu-[1-2]-a")
    assert [first_node(one) for one in lists] == ["n1", "n1", "n1", "n07", "gpu-1-a"]


def test_no_cluster_is_said_with_what_to_do():
    with pytest.raises(UserError, match=r"finds neither Slurm.*vision_jax launch"):
        find_place({})


def test_open_mpi_that_hides_its_address():
    hidden = {name: value for name, value in OMPI.items() if "uri" not in name}
    with pytest.raises(UserError, match="Open MPI does not say where process 0 runs"):
        find_place(hidden)
    alone = {**hidden, "OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    assert find_place(alone).coordinator.startswith("127.0.0.1:")
