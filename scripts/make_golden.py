"""Makes tests/golden/: tiny PyTorch ViTs with random weights, and what they compute.

Each folder holds a checkpoint as timm or transformers saves it and outputs.safetensors: images
f32[2, H, W, 3] in [0, 1], the output of each block and the logits (the pooled vector for a tower
without a head). The tests without torch compare against these; tests/parity compares live.

    python scripts/make_golden.py [FOLDER]    # with the `parity` extra; rewrites tests/golden

Made with torch 2.14, timm 1.0.31 and transformers 5.23.
"""

import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "parity")]

from vit_references import timm_reference, transformers_reference  # noqa: E402 (by that path)

from vision_jax.certify.random_weights import randomize  # noqa: E402
from vision_jax.convert import read_weights, recognize, write_safetensors  # noqa: E402
from vision_jax.convert.tables import table_for_export  # noqa: E402

SMALL = {"patch_size": 4, "embed_dim": 32, "num_heads": 2, "num_classes": 5, "mlp_ratio": 1.5}
TOWER = {"patch_size": 4, "hidden_size": 32, "intermediate_size": 48}
SIDE = 12  # pixels
VARIANTS = {
    "timm_deit_distilled": lambda: timm_reference("deit_tiny_distilled_patch16_224", SIDE, **SMALL),
    "timm_dinov2_swiglu_registers": lambda: timm_reference(
        "vit_giant_patch14_reg4_dinov2", SIDE, **SMALL
    ),
    "transformers_clip": lambda: transformers_reference("CLIPVisionModel", SIDE, **TOWER),
    "transformers_siglip": lambda: transformers_reference("SiglipVisionModel", SIDE, **TOWER),
}


def main() -> None:
    """Writes every variant."""
    golden = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "tests" / "golden"
    for seed, (name, build) in enumerate(VARIANTS.items()):
        folder = golden / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        reference, size = build()
        randomize(reference.module, seed)
        weights = read_weights(reference.save(folder))
        for path in folder.iterdir():
            if path.name not in ("model.safetensors", "config.json"):
                path.unlink()
            else:
                path.chmod(0o644)
        family, arguments = recognize(weights)
        modules = table_for_export(reference.source, family, arguments).modules(arguments)
        images = np.random.default_rng(seed).random((2, *size, 3)).astype(np.float32)
        mean, std = (np.asarray(arguments[key]) for key in ("mean", "std"))
        blocks = {key: path for key, path in modules.items() if key.startswith("block_")}
        outputs = reference.outputs(((images - mean) / std).astype(np.float32), blocks)
        write_safetensors(folder / "outputs.safetensors", {"images": images, **outputs})
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
