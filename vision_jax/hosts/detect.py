"""Where a process stands in its run, by what its cluster has put in the environment.

Slurm, Open MPI, Kubernetes' JobSet (with deploy/jobset.yaml's variables) and Cloud TPU; whatever
else JAX knows comes last.
"""

import os
import re
from collections.abc import Mapping

from vision_jax.errors import UserError
from vision_jax.hosts.link import Place

PORTS = 4096  # the highest ports, of which a job's number chooses
KUBERNETES_PORT = 8476


def find_place(environment: Mapping[str, str]) -> Place:
    """The place of this process.

    JAX_COORDINATOR_ADDRESS and JAX_COORDINATOR_PORT come before what a cluster says.

    Args:
      environment: os.environ.

    Raises:
      UserError: no cluster is known, or it does not say all.
    """
    found = next(
        (place for read in (_slurm, _open_mpi, _jobset) if (place := read(environment))), None
    )
    if found is None:
        return _by_jax()
    name, host, usual, processes, process = found
    address = environment.get("JAX_COORDINATOR_ADDRESS", "")
    if not address and not host:
        raise UserError(
            f"--coordinator=auto: {name} does not say where process 0 runs: give "
            "--coordinator=HOST:PORT, --processes and --process, or JAX_COORDINATOR_ADDRESS"
        )
    port = environment.get("JAX_COORDINATOR_PORT", str(usual))
    try:
        return Place(address or f"{host}:{port}", int(processes), int(process))
    except ValueError as error:
        raise UserError(f"--coordinator=auto: {name} says no number ({error})") from error


# (cluster, host of process 0, port, processes, process)
_Found = tuple[str, str, int, str, str]


def _slurm(environment: Mapping[str, str]) -> _Found | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
    if any(name not in environment for name in names):
        return None
    job, nodes, processes, process = (environment[name] for name in names)
    return "Slurm", first_node(nodes), _port(job, 1), processes, process


def first_node(nodes: str) -> str:
    """The first of Slurm's list of nodes.

    Examples:
      >>> [first_node(nodes) for nodes in ("a1", "a1,b2", "a[001-004,9],b", "a[3,5]-x")]
      ['a1', 'a1', 'a001', 'a3-x']
    """
    name = re.match(r"([^\[,]*)(?:\[([^\]\-,]*)[^\]]*\]([^,]*))?", nodes)
    return "".join(part or "" for part in name.groups()) if name else ""


def _open_mpi(environment: Mapping[str, str]) -> _Found | None:
    names = ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")
    if any(name not in environment for name in names):
        return None
    processes, process = (environment[name] for name in names)
    # mpirun's own address, where rank 0 runs: "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"; from
    # Open MPI 5 on "prterun-host-1234@0.0;tcp4://10.96.0.1:34911", whose last is the first's child.
    uri = environment.get("OMPI_MCA_orte_hnp_uri") or environment.get("PRTE_MCA_prte_hnp_uri", "")
    host = re.search(r"tcp4?://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    job = re.match(r"\d+", uri)
    pid = re.match(r"[^;@]*-(\d+)@", uri)
    address = next(filter(None, host.groups()), "") if host else ""
    if not address and environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == processes:
        address = "127.0.0.1"  # all are here
    port = _port(pid[1], 1) if pid else _port(job[0] if job else "0", PORTS)
    return "Open MPI", address, port, processes, process


def _jobset(environment: Mapping[str, str]) -> _Found | None:
    """The first pod of the set's first job is process 0; its name is that of a headless service."""
    names = ("JOBSET_NAME", "REPLICATED_JOB_NAME", "JOB_COMPLETION_INDEX", "PROCESSES")
    if any(name not in environment for name in names):
        return None
    set_name, job, index, processes = (environment[name] for name in names)
    host = f"{set_name}-{job}-0-0.{set_name}"
    before = environment.get("JOB_INDEX", "0"), environment.get("PODS_A_JOB", "0")
    try:
        process = int(before[0]) * int(before[1]) + int(index)
    except ValueError:
        return "JobSet", host, KUBERNETES_PORT, processes, index
    return "JobSet", host, KUBERNETES_PORT, processes, str(process)


def _port(job: str, unit: int) -> int:
    """One of the highest, so that jobs that share a machine seldom share a port; as JAX's.

    Args:
      job: its number.
      unit: what these numbers are multiples of.
    """
    return 65_536 - PORTS + int(job if job.isdecimal() else "0") // unit % PORTS


def _by_jax() -> Place:
    """Cloud TPU (GKE, TPU VMs) and the rest, as JAX finds them; importing it starts no thread."""
    from jax._src.clusters import ClusterEnv

    try:
        address, processes, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, 300
        )
    except Exception as error:  # metadata servers, names that nobody knows
        raise UserError(f"--coordinator=auto: {str(error) or type(error).__name__}") from error
    if address is None or processes is None or process is None:
        raise UserError(
            "--coordinator=auto finds neither Slurm, Open MPI, a JobSet nor Cloud TPU: give "
            "--coordinator=HOST:PORT, --processes and --process, or `vision_jax launch "
            "--processes=N -- ...` on one machine"
        )
    return Place(address, processes, process)


def share_of_gpus(environment: Mapping[str, str], rank: int, count: int) -> str:
    """JAX_LOCAL_DEVICE_IDS for one of several processes of this machine: its NVIDIA GPUs.

    "" where the environment says something of them already, or there are too few to share.

    Args:
      environment: os.environ.
      rank: of the process among those of this machine.
      count: of these.
    """
    if {"JAX_LOCAL_DEVICE_IDS", "CUDA_VISIBLE_DEVICES"} & environment.keys():
        return ""
    found = sum(bool(re.fullmatch(r"nvidia\d+", name)) for name in os.listdir("/dev"))
    share = found // count
    return ",".join(map(str, range(rank * share, (rank + 1) * share)))


def devices_of_this(environment: Mapping[str, str]) -> str:
    """JAX_LOCAL_DEVICE_IDS under Open MPI, of which JAX knows no later version than 4; "" else."""
    names = ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    if any(not environment.get(name, "").isdecimal() for name in names):
        return ""
    rank, count = (int(environment[name]) for name in names)
    return share_of_gpus(environment, rank, count) if count > 1 else ""
