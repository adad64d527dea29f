"""Makes tests/golden/corruptions.npz: what the package imagecorruptions makes of a random image.

    pip install imagecorruptions scikit-image opencv-python-headless
    python scripts/make_golden_corruptions.py

Made with imagecorruptions 1.1.2, scikit-image 0.26.0, opencv-python-headless 5.0.0 and SciPy's and
NumPy's legacy generator, seeded with the severity. Not in the file: frost (its photographs are not
used here), JPEG and pixelate (Pillow's own).
"""

from pathlib import Path

import imagecorruptions.corruptions as reference
import numpy as np
import skimage
from PIL import Image
from scipy.ndimage import gaussian_filter

from vision_jax.data.corruptions import PARAMETERS

SIDE = 40
SEVERITIES = (1, 3, 5)
THEIR_NAMES = {"elastic": "elastic_transform"}


def blur(image, sigma, multichannel=False, **more):
    """scikit-image's filter under the arguments it had when imagecorruptions was written."""
    axis = 2 if multichannel else None
    return skimage.filters.gaussian(image, sigma=sigma, channel_axis=axis, **more)


def main() -> None:
    """Writes the image and its corrupted versions, {name}_{severity}."""
    np.float_ = np.float64  # gone from NumPy since
    reference.gaussian = blur
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.normal(size=(SIDE, SIDE, 3)), (3, 3, 0))
    noise = rng.normal(size=(SIDE, SIDE, 3))
    image = np.clip(128 + 900 * smooth + 10 * noise, 0, 255).astype(np.uint8)
    arrays = {"image": image}
    for name in PARAMETERS:
        if name in ("frost", "jpeg", "pixelate"):
            continue
        for severity in SEVERITIES:
            np.random.seed(severity)
            if name == "impulse_noise":  # of a generator that it would seed from the clock
                made = skimage.util.random_noise(
                    image / 255,
                    mode="s&p",
                    amount=PARAMETERS[name][0][severity - 1],
                    rng=np.random.default_rng(severity),
                )
                made = np.clip(made, 0, 1) * 255
            else:
                if name == "elastic":  # ours draws an affine map first
                    np.random.uniform(size=6)
                function = getattr(reference, THEIR_NAMES.get(name, name))
                made = function(Image.fromarray(image), severity)
            arrays[f"{name}_{severity}"] = np.uint8(made)
    path = Path(__file__).parents[1] / "tests" / "golden" / "corruptions.npz"
    np.savez_compressed(path, **arrays)
    print(f"wrote {path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
