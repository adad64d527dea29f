"""Every benchmark starts: the commands that the documentation cites, at small size."""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest
import runs

SHORT = ("--config.total_steps=2", "--config.optim.warmup_steps=0", "--config.batch_size=8")
FEW_IMAGES = (  # 48 and 20: the benchmarks' own test images are 1,000
    "--config.data.train=cifar10:{inputs}/train",
    "--config.data.eval=cifar10:{inputs}/test",
)
BRIEF = ("--rounds=1", "--seconds=0")
BENCHMARKS = {
    "adversarial": ("--seeds=1", "--rows", "LoRA", *SHORT, *FEW_IMAGES),
    "attacks": ("--images=2", "--steps=1", "--cw_steps=1", "--models", "vit"),
    "autoattack": ("--images=4", "--steps=1", "--models", "resnet"),
    "checksums": ("--gigabytes=0.02",),
    "coco_evaluation": ("--images=3", "--detections=4"),
    "detection_input": ("--images=4", "--threads=1"),
    "detectors": ("--small", "--jobs", "NMS", *BRIEF),
    "segmenters": ("--small", "--jobs", "forward", *BRIEF),
    "small_detectors": ("--seeds=1", *SHORT, "--config.data.eval=composites:test/0/4"),
    "duplicates": ("--images=50",),
    "distillation": ("--seeds=1", "--rows", "alone", "--teacher=none", *SHORT, *FEW_IMAGES),
    "explanations": ("--small", *BRIEF),
    "gpu": ("--small", "--jobs", "LoRA", "--switched", "none", *BRIEF),
    "imbalance": ("--seeds=1", "--most=3", "--ratio=2", *SHORT, *FEW_IMAGES),
    "import_weights": ("--depth=1", "--repeats=1"),
    "input": ("--small", *BRIEF),
    "listing": ("--files=20", "--classes=2", "--boxes=20", "--repeats=1"),
    "inference": ("--small", "--jobs", "ViT", *BRIEF),
    "insertion": ("--images=3", "--greedy=1", "--nodes=2", *SHORT, *FEW_IMAGES),
    "lora_step": ("--variant=ti/16", "--depth=1", "--image_size=32", "--batch=2"),
    "matching": ("--problems=2", "--targets=5", "--queries=6"),
    "pgd": ("--small", *BRIEF),
    "quantization": ("--tiles=5",),
    "safety": ("--variant=ti/16", "--image_size=32", "--batch_size=4"),
    "search": ("--parts", "flops", "best", "--trials=2", "--seeds=1", *SHORT, *FEW_IMAGES),
    "serving": ("--requests=20", "--clients=4", "--rounds=1", "--photos=4"),
    "startup": ("--configs", "configs/vit_lora.py", "--rounds=1"),
    "token_merging": (
        "--weights=embedded:vit_cifar10",
        "--merge=0,4",
        "--rounds=1",
        "--files=onnx",
    ),
    "tracking": ("--rates=5", "--seconds=4", "--seeds=1"),
    "training": ("--small", "--jobs", "LoRA", "MAE", *BRIEF),
    "transfer": ("--seeds=1", "--recipes", "LoRA, pretrained", *SHORT, *FEW_IMAGES),
}
BESIDE = {  # what these measure beside, of the extra `parity`
    "attacks": "foolbox",
    "autoattack": "torchattacks",
    "coco_evaluation": "pycocotools",
    "detectors": "yolox",
    "explanations": "captum",
    "gpu": "peft",
    "import_weights": "torch",
    "inference": "timm",
    "input": "torchvision",
    "listing": "torchvision",
    "pgd": "torchattacks",
    "segmenters": "transformers",
    "serving": "fastapi",
    "tracking": "trackers",
    "training": "peft",
}
SHARED = {
    "beside",
    "ours",
    "peers",
    "detector_peers",
    "segmenter_peers",
    "video",  # of a video that isn't in the repository
    "video_ours",
    "video_peers",
}  # no commands: what the tables beside peers have in common


def skip_without_its_reference(name):
    if name in BESIDE and importlib.util.find_spec(BESIDE[name]) is None:
        pytest.skip(f"needs {BESIDE[name]}")


def test_every_benchmark_is_here():
    assert {path.stem for path in (runs.ROOT / "benchmarks").glob("*.py")} == {
        *BENCHMARKS,
        *SHARED,
    }


@pytest.mark.filterwarnings("ignore:Please import `gaussian_filter`:DeprecationWarning")  # foolbox
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_knows_its_flags(name, monkeypatch, capsys):
    skip_without_its_reference(name)
    monkeypatch.syspath_prepend(runs.ROOT)
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert not stop.value.code
    known = capsys.readouterr().out
    for flag in BENCHMARKS[name]:
        if flag.startswith("--") and not flag.startswith("--config."):
            assert flag.split("=")[0] in known


@pytest.mark.long
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs(name, monkeypatch):
    skip_without_its_reference(name)
    monkeypatch.setenv("XLA_FLAGS", runs.xla_flags(1))
    arguments = [flag.format(inputs=runs.inputs()) for flag in BENCHMARKS[name]]
    found = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", *arguments],
        cwd=runs.ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert found.stdout
