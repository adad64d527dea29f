"""deploy/'s files for several machines, run with stand-ins for srun, mpirun and gcloud."""

import os
import re
import stat
import subprocess
import sys

import pytest
import runs
import yaml

from vision_jax import main
from vision_jax.hosts import detect, judge

FOLDER = runs.ROOT / "deploy"
# vision_jax's stand-in says what it was given and where it is, and ends as CODE says.
PROGRAM = f"""#!{sys.executable}
import os, sys
sys.path.insert(0, {str(runs.ROOT)!r})
from vision_jax.hosts import detect
place = detect.find_place(os.environ)
print("at", place.coordinator, place.processes, place.first, sys.argv[1:], flush=True)
sys.exit(int(os.environ.get("CODE", "0")))
"""
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
code=0
for process in 0 1 2; do
    SLURM_JOB_ID=7 SLURM_STEP_NODELIST=a[1-3] SLURM_NTASKS=3 SLURM_PROCID=$process "$@" || code=$?
done
exit $code
"""
MPIRUN = """#!/bin/bash
while [[ $1 == -* ]]; do
    case $1 in --host | --map-by | -x) shift 2 ;; *) shift ;; esac
done
code=0
for process in 0 1; do
    OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=$process "$@" || code=$?
done
exit $code
"""
GCLOUD = """#!/bin/bash
for argument; do
    case $argument in --command=*) exec bash -c "${argument#--command=}" ;; esac
done
echo "gcloud $*"
"""


@pytest.fixture
def run(tmp_path):
    """Runs a script of deploy/ with the stand-ins; (exit code, screen)."""
    programs = {"vision_jax": PROGRAM, "srun": SRUN, "mpirun": MPIRUN, "gcloud": GCLOUD}
    programs["scontrol"] = '#!/bin/bash\necho "scontrol $*"\n'
    home = tmp_path / "home/venv/bin"
    home.mkdir(parents=True)
    for folder in (tmp_path, home):
        for name, text in programs.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def call(script, *arguments, **environment):
        done = subprocess.run(
            ["bash", str(FOLDER / script), *arguments],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "HOME": str(tmp_path / "home"),
                **environment,
            },
        )
        return done.returncode, done.stdout + done.stderr

    return call


ARGUMENTS = ("--config=configs/vit_lora.py", '--config.trainable=("head/.*",)', "--workdir=a b")
PASSED = re.escape(str([*ARGUMENTS, "--coordinator=auto"]))


@pytest.mark.long
def test_slurm_starts_all_and_queues_again_what_was_lost(run):
    code, screen = run("slurm.sbatch", *ARGUMENTS)
    assert code == 0
    places = re.findall(rf"^at (\S+) 3 (\d) {PASSED}$", screen, re.M)
    assert places == [("a1:61447", str(n)) for n in range(3)]
    code, screen = run("slurm.sbatch", *ARGUMENTS, CODE=str(judge.LOST), SLURM_JOB_ID="7")
    assert screen.splitlines()[-1] == "scontrol requeue 7"
    code, screen = run("slurm.sbatch", *ARGUMENTS, CODE=str(judge.BAD), SLURM_JOB_ID="7")
    assert code == judge.BAD
    assert "scontrol" not in screen
    code, screen = run("slurm.sbatch", CODE="75", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="20")
    assert (code, "scontrol" in screen) == (judge.LOST, False)


@pytest.mark.long
def test_open_mpi_starts_all_and_again_what_was_lost(run):
    code, screen = run("mpirun.sh", "n1:1,n2:1", *ARGUMENTS)
    assert code == 0
    places = re.findall(rf"^at (\S+) 2 (\d) {PASSED}$", screen, re.M)
    assert places == [("n1:12321", "0"), ("n1:12321", "1")]
    code, screen = run("mpirun.sh", "n1:1,n2:1", *ARGUMENTS, CODE=str(judge.LOST), TRIES="3")
    assert (code, screen.count("at n1:12321")) == (judge.LOST, 6)
    code, screen = run("mpirun.sh", "n1:1,n2:1", *ARGUMENTS, CODE=str(judge.BAD), TRIES="3")
    assert (code, screen.count("at n1:12321")) == (judge.BAD, 2)
    code, screen = run("mpirun.sh")
    assert code == 2
    assert "deploy/mpirun.sh node1:8,node2:8" in screen


@pytest.mark.long
def test_tpu_vms(run):
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "w", "SLURM_NTASKS": "1"}
    slurm["SLURM_PROCID"] = "0"  # for the stand-in alone
    code, screen = run("tpu_vm.sh", "run", "slice", "zone", *ARGUMENTS, **slurm)
    assert code == 0
    assert re.search(PASSED, screen)
    code, screen = run("tpu_vm.sh", "run", "slice", "zone", CODE="75", TRIES="2", **slurm)
    assert (code, screen.count("at w:")) == (judge.LOST, 2)
    code, screen = run("tpu_vm.sh", "install", "slice", "zone")
    copied = re.search(r"--worker=all (.*) slice:source/", screen)[1].split()
    assert all((runs.ROOT / name).exists() for name in copied)
    assert run("tpu_vm.sh", "delete", "slice", "zone")[0] == 2


@pytest.mark.parametrize("name", ["slurm.sbatch", "mpirun.sh", "tpu_vm.sh"])
def test_scripts_are_sound(name):
    subprocess.run(["bash", "-n", str(FOLDER / name)], check=True)
    runnable = (FOLDER / name).stat().st_mode & stat.S_IXUSR
    assert bool(runnable) == name.endswith(".sh")


@pytest.mark.parametrize("name", ["jobset.yaml", "gke_tpu.yaml"])
def test_pods_find_each_other(name):
    """As JobSet labels them; its own schema was asked when the files were written."""
    (manifest,) = yaml.safe_load_all((FOLDER / name).read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    (container,) = spec["template"]["spec"]["containers"]
    set_name = manifest["metadata"]["name"]
    places = []
    for index in range(job["replicas"]):
        for pod in range(spec["completions"]):
            annotations = {
                "jobset.sigs.k8s.io/jobset-name": set_name,
                "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
                "jobset.sigs.k8s.io/job-index": str(index),
            }
            environment = {"JOB_COMPLETION_INDEX": str(pod)}  # of an Indexed Job
            for one in container["env"]:
                if "value" in one:
                    environment[one["name"]] = one["value"]
                else:
                    path = one["valueFrom"]["fieldRef"]["fieldPath"]
                    key = re.fullmatch(r"metadata\.annotations\['(.*)'\]", path)[1]
                    environment[one["name"]] = annotations[key]
            places.append(detect.find_place(environment))
    count = job["replicas"] * spec["completions"]
    assert [place.first for place in places] == list(range(count))
    assert {place.processes for place in places} == {count}
    port = container["ports"][0]["containerPort"]
    address = f"{set_name}-{job['name']}-0-0.{set_name}:{port}"
    assert {place.coordinator for place in places} == {address}
    assert container["command"] == ["vision_jax"]
    flags, _ = main._parse("train", container["args"])
    assert flags["coordinator"] == "auto"
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [judge.BAD]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    mounted = {one["name"] for one in container["volumeMounts"]}
    assert mounted == {one["name"] for one in spec["template"]["spec"]["volumes"]}
