#!/usr/bin/env bash
# Of the step counts from 1 to 1000, 62 give diffusers' "trailing" schedulers one timestep more than was
# asked for, -1: the model is asked at a time that it was not trained on, and the scheduler then takes
# the last of its table, that of the most noise, for an image that is clean already.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 diffusers==0.42.1
cat > "$folder/check.py" <<'PYTHON'
import sys
from importlib.metadata import version

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

print(f"diffusers {version('diffusers')}, torch {version('torch')}")
as_seen = True
for kind in (DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler):
    longer = []
    for count in range(1, 1001):
        scheduler = kind(timestep_spacing="trailing")
        scheduler.set_timesteps(count)
        if len(scheduler.timesteps) == count + 1 and scheduler.timesteps[-1] == -1:
            longer.append(count)
    print(f"{kind.__name__}: {len(longer)} counts have a step more, at -1: {longer[:6]} ...")
    as_seen &= len(longer) == 62 and longer[:3] == [61, 103, 121]


def errors(count):
    """How far the last samples are from an image, where the model is right down to time 0."""
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(count)
    image, sample = torch.linspace(-1, 1, 16).double(), torch.linspace(2, -2, 16).double()
    far = []
    for time in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[time].double()
        if time >= 0:
            noise = (sample - kept.sqrt() * image) / (1 - kept).sqrt()
        sample = scheduler.step(noise, time, sample).prev_sample
        far.append((sample - image).abs().max().item())
    return far[-2:]


for count in (60, 61):
    before, after = errors(count)
    print(f"{count} steps of DDIM: {before:.1g} off before the last step, {after:.1g} after it")
as_seen &= before < 1e-6 and after > 100
print("as seen in December 2026" if as_seen else "CHANGED")
sys.exit(not as_seen)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
