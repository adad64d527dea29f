"""Training in bfloat16 on one GPU beside timm, PEFT and transformers with torch.compile.

    pip install -e '.[parity]' && pip install -U 'jax[cuda12]'
    python -m benchmarks.gpu --json=gpu.json         # at most ten minutes
    python -m benchmarks.gpu --small                 # tiny models on a CPU, not compiled by torch

The jobs come in the order of what they tell, and each is written to the file as soon as it is
measured. What the time that is left has no room for is left out, and said. Then come the switches:
our own step once more, with one thing done otherwise. Ratios are of wall time, the peer's over
ours; a batch is on the device already. benchmarks/beside.py says what the columns are; GB are the
device's.
"""

import os
import time
from dataclasses import replace

from benchmarks import beside
from benchmarks.beside import Call, Job, Options, Report
from benchmarks.training import DETR, LORA, SMALL_DETR, SMALL_VIT

FLAGS = {  # of XLA, one side of its own each
    "latency hiding": "--xla_gpu_enable_latency_hiding_scheduler=true",
    "no Triton": "--xla_gpu_enable_triton_gemm=false",
    "NHWC": "--xla_gpu_force_conv_nhwc=true",
    "NCHW": "--xla_gpu_force_conv_nchw=true",
}
BFLOAT16 = {"model.dtype": "bfloat16"}
DISTILL = {"recipes": ("distill",), "distill.dtype": "bfloat16", "distill.temperature": 1.0}
PGD = {"recipes": ("adversarial",), "adversarial.steps": 3, "adversarial.watch": 0}


def step(
    name: str,
    build: str,
    batch_size: int,
    size: int = 224,
    how: str = "compile",
    fields: dict | None = None,
    task: str = "classification",
    tolerance: float = 0.02,
    **peer,
) -> Job:
    """A training step of ours and of a peer's; `peer` has further keywords of the peer's."""
    shared = {
        "batch_size": batch_size,
        "image_size": size,
        "classes": 91 if task == "detection" else 10,
    }
    teacher = {"teacher": "teacher"} if "teacher" in peer else {}
    ours = {**shared, **teacher, "task": task, "fields": {**BFLOAT16, **(fields or {})}}
    theirs = {**shared, "build": build, "bfloat16": True, "how": how, **peer}
    return Job(name, ("ours.train", ours), {how: ("peers.train", theirs)}, tolerance)


def jobs(small: bool) -> list[Job]:
    """In the order in which they are measured."""
    vit, base, large = "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224"
    resnet, tiny, few, detr = "resnet50", {}, {}, {}
    count, size, wide, compiled = 256, 224, 480, "compile"
    if small:
        vit = base = large = "vit_tiny_patch16_224"
        tiny, detr = {"arguments": SMALL_VIT}, {"arguments": SMALL_DETR}
        resnet, few = "resnet18", {"arguments": {"layers": (1, 1, 1, 1)}}
        count, size, wide, compiled = 8, 32, 64, "eager"
    tiny["how"] = compiled
    return [
        step("ViT-B/16", base, count, size, **tiny),
        step("ResNet-50", resnet, count, size, f"{compiled} channels", **few),
        step("LoRA ViT-B/16", base, count, size, fields=LORA, lora=8, **tiny),
        step("DETR-R50", "", count // 8, wide, "eager", DETR, "detection", 0.3, **detr),
        step("ViT-L/16", large, count // 2, size, **tiny),
        step("PGD-3, ViT-S/16", vit, count, size, fields=PGD, tolerance=0.2, attack=3, **tiny),
        step("ViT-B/16 teaches ViT-S/16", vit, count, size, fields=DISTILL, teacher=base, **tiny),
    ]


def switched(job: Job) -> Job:
    """Our side of a job beside itself with one thing done otherwise."""
    name, keywords = job.ours
    sides: dict[str, Call] = dict(job.peers)
    for switch in ("half accumulation", "no cuDNN attention"):
        sides[switch] = (name, {**keywords, "switches": (switch,)})
    for switch, flag in FLAGS.items():
        flags = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
        sides[switch] = (name, {**keywords, "environment": {"XLA_FLAGS": flags}})
    return Job(f"{job.name}, switches", job.ours, sides, job.tolerance)


def main() -> int:
    """Prints the table."""
    parser = beside.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=9.5, help="that it may take in all")
    parser.add_argument("--switched", nargs="*", default=["ViT-B/16", "ResNet-50"], help="jobs")
    flags = parser.parse_args()
    # Several processes share the device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    end = time.monotonic() + 60 * flags.minutes
    options = Options((), 0, flags.rounds, flags.seconds, "wall", True, end - beside.GRACE)
    every = jobs(flags.small)
    chosen = [job for job in every if any(word in job.name for word in flags.jobs)]
    report = Report(flags.json, threads=0)
    longest = 0.0
    square = {"side": 512 if flags.small else 8192, "dtype": "bfloat16"}
    with beside.matmul(options, ("ours.matmul", square)) as peak:
        for job in [*chosen, *(switched(job) for job in every if job.name in flags.switched)]:
            start = time.monotonic()
            left = end - start
            if left < longest:
                print(
                    f"{job.name}\n  left out: {left:.0f} s left, the longest took {longest:.0f} s"
                )
                report.say([{"job": job.name, "error": f"left out, {left:.0f} s left"}])
                continue
            kinds = tuple(job.peers) if job not in chosen else ()
            now = replace(options, peers=kinds)
            report.add(job.name, lambda job=job, now=now: beside.measure(job, now, peak))
            longest = max(longest, time.monotonic() - start)
    return report.failed


if __name__ == "__main__":
    raise SystemExit(main())
