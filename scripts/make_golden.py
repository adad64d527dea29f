"""Makes tests/golden/: tiny PyTorch ViTs with random weights, and what they compute.

Each folder holds a checkpoint as timm or transformers saves it and outputs.safetensors: images
f32[2, H, W, 3] in [0, 1], the output of each block and the logits (the pooled vector for a tower
without a head). The tests without torch compare against these; tests/parity compares live.

    python scripts/make_golden.py    # with the `parity` extra; rewrites tests/golden

Made with torch 2.14, timm 1.0.31 and transformers 5.23.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

import vit_references as references  # noqa: E402 (found through the path above)

from vision_jax.convert import (  # noqa: E402
    read_weights,
    recognize,
    write_safetensors,
)

SMALL = {"patch_size": 4, "embed_dim": 32, "num_heads": 2, "img_size": 12, "num_classes": 5}
TOWER = {"image_size": 12, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
VARIANTS = {
    "timm_deit_distilled": references.timm_reference(
        "deit_tiny_distilled_patch16_224", **SMALL, mlp_ratio=1.5
    ),
    "timm_dinov2_swiglu_registers": references.timm_reference(
        "vit_giant_patch14_reg4_dinov2", **SMALL, mlp_ratio=1.5
    ),
    "transformers_clip": references.transformers_reference(
        "CLIPVisionModel", "CLIPVisionConfig", references.pooled, **TOWER
    ),
    "transformers_siglip": references.transformers_reference(
        "SiglipVisionModel", "SiglipVisionConfig", references.pooled, **TOWER
    ),
}


def main() -> None:
    """Writes every variant."""
    for seed, (name, build) in enumerate(VARIANTS.items()):
        folder = ROOT / "tests" / "golden" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reference = build()
        references.randomize(reference.model, seed)
        weights = read_weights(reference.save(reference.model, folder))
        for path in folder.iterdir():
            if path.name not in ("model.safetensors", "config.json"):
                path.unlink()
            else:
                path.chmod(0o644)
        _, arguments = recognize(weights)
        size = arguments["image_size"]
        images = np.random.default_rng(seed).random((2, *size, 3)).astype(np.float32)
        outputs = reference.outputs(images, arguments)
        write_safetensors(folder / "outputs.safetensors", {"images": images, **outputs})
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
