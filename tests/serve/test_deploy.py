"""What deploy/ says fits the server and the repository: no cluster and no Docker is needed."""

import json
import re
import tomllib
import tracemalloc

import numpy as np
import pytest
import runs
import yaml

from vision_jax.commands import serve
from vision_jax.data.decode import TooManyPixelsError
from vision_jax.data.segmentation_transforms import SegmentationPreprocessing
from vision_jax.serve.body import Limits
from vision_jax.serve.model import AT_ONCE, STRIP_BYTES, _look_at_all
from vision_jax.tasks.segmentation.windows import predict_by_windows

FOLDER = runs.ROOT / "deploy"
LINES = (FOLDER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
MANIFEST = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))

WINDOW, CLASSES = 512, 21  # of docs/serving.md's example


def instructions(name):
    return [line.split(maxsplit=1)[1] for line in LINES if line.startswith(f"{name} ")]


def arguments_of(container):
    """The server's flags with the image's entry point before them."""
    (entry,) = instructions("ENTRYPOINT")
    program, command, *flags = json.loads(entry)
    assert (program, command) == ("vision_jax", "serve")
    return serve._parse([*flags, *container])


def test_the_dockerfile_copies_what_is_there_and_not_ignored():
    ignored, *rest = (FOLDER / "Dockerfile.dockerignore").read_text().split()
    assert ignored == "*"
    kept = {line[1:] for line in rest if line.startswith("!")}
    copied = {
        source
        for line in instructions("COPY")
        if not line.startswith("--from")
        for source in line.split()[:-1]
    }
    assert copied == kept
    assert all((runs.ROOT / source).exists() for source in copied)
    project = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())
    assert project["project"]["readme"] in copied
    assert set(project["project"]["license-files"]) <= copied
    assert set(project["tool"]["setuptools"]["package-dir"].values()) <= copied


def test_the_image_runs_the_server_as_nobody_in_particular():
    assert instructions("USER") == ["10001:10001"]
    assert instructions("STOPSIGNAL") == ["SIGTERM"]
    (default,) = instructions("CMD")
    flags = arguments_of(json.loads(default))
    assert (flags.host, str(flags.port)) == ("0.0.0.0", *instructions("EXPOSE"))
    pythons = {line.split()[0] for line in instructions("FROM")}
    noted = re.search(r"Python (3\.\d+)", (runs.ROOT / "constraints.txt").read_text())
    assert pythons == {f"python:{noted[1]}-slim-bookworm"}
    (check,) = instructions("HEALTHCHECK")
    code = json.loads(check[check.index("[") :])[2]
    compile(code, "HEALTHCHECK", "exec")
    assert f":{flags.port}/health" in code


def test_the_manifest_is_of_that_image():
    kinds = [one["kind"] for one in MANIFEST]
    assert kinds == ["Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"]
    deployment, service, budget, policy = (one["spec"] for one in MANIFEST)
    pod = deployment["template"]["spec"]
    (container,) = pod["containers"]
    labels = deployment["template"]["metadata"]["labels"]
    for selector in (
        deployment["selector"]["matchLabels"],
        service["selector"],
        budget["selector"]["matchLabels"],
        policy["podSelector"]["matchLabels"],
    ):
        assert selector == labels
    assert str(pod["securityContext"]["runAsUser"]) == instructions("USER")[0].split(":")[0]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    flags = arguments_of(container["args"])
    (port,) = container["ports"]
    assert port["containerPort"] == flags.port
    assert service["ports"][0]["targetPort"] == port["name"]
    for probe, path in (
        ("startupProbe", "/health"),
        ("readinessProbe", "/health"),
        ("livenessProbe", "/live"),
    ):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + flags.deadline + 5
    mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
    written = {
        value
        for line in instructions("ENV")
        for name, value in (pair.split("=", 1) for pair in line.split())
        if "CACHE" in name and value.startswith("/")
    }
    assert written <= mounted


def test_the_manifest_has_memory_for_the_worst():
    """Of images that are decoded at once, or seen by windows, of bodies, and of the process."""
    (container,) = MANIFEST[0]["spec"]["template"]["spec"]["containers"]
    flags = arguments_of(container["args"])
    windows = STRIP_BYTES + 2 * AT_ONCE * WINDOW**2 * CLASSES * 4
    thread = max(flags.most_megapixels * 15, flags.most_megapixels * 7 + windows / 1e6)
    worst = flags.threads * thread + Limits().held_bytes / 1e6 + 600
    limit = container["resources"]["limits"]["memory"]
    assert worst < int(limit.removesuffix("Gi")) * 2**30 / 1e6
    cpus = container["resources"]["limits"]["cpu"]
    assert {"name": "NPROC", "value": cpus} in container["env"]
    assert flags.threads == int(cpus)


@pytest.mark.parametrize(
    ("classes", "columns"), [(CLASSES, STRIP_BYTES // (WINDOW * CLASSES * 4)), (150, 4 * WINDOW)]
)
def test_a_wider_image_than_is_counted_is_refused(classes, columns):
    look = _look_at_all(SegmentationPreprocessing((8, 8), (0.5,), (0.5,)), WINDOW, classes)
    assert look(np.zeros((1, columns, 1), np.uint8)).size == (1, columns)
    with pytest.raises(TooManyPixelsError, match=f"has {columns + 1} columns: at most {columns} "):
        look(np.zeros((1, columns + 1, 1), np.uint8))


def test_a_thread_holds_by_windows_what_is_counted():
    window, columns = 64, 700
    image = np.zeros((150, columns, 3), np.uint8)

    def scores_of(windows):
        return iter(np.zeros((*windows.shape[:3], CLASSES), np.float32))

    tracemalloc.start()
    try:
        predict_by_windows(
            image, scores_of, window=window, stride=43, at_once=AT_ONCE, fill=[0, 0, 0]
        )
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counted = 4 * CLASSES * window * (columns + 2 * AT_ONCE * window) + image.size
    assert 0.8 * counted < peak < 1.1 * counted
