"""The Swin Transformers that are certified, and where their published weights are."""

from typing import Any

from vision_jax.convert.swin.config import BUILDERS, transformers_config
from vision_jax.convert.table import Entry
from vision_jax.models.swin import VARIANTS, Swin


def _transformers_entry(name: str, published: str) -> Entry:
    arguments: dict[str, Any] = {name: getattr(Swin, name, None) for name in Swin.__annotations__}
    config = transformers_config({**arguments, **VARIANTS[name], "num_classes": 1})
    (build,) = config.pop("architectures")
    config["num_labels"] = 1000
    del config["model_type"]
    return Entry(
        f"transformers/{published}",
        "Swin v2" if build.startswith("Swinv2") else "Swin",
        build,
        tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in config.items()),
        reduced=_REDUCED if "large" in name else (),
        image_size=VARIANTS[name]["image_size"][0],
        published=f"hf://microsoft/{published}",
        license="apache-2.0",
    )


_REDUCED = (("depths", (2, 2, 2, 2)),)
_CERTIFIED = tuple(name for name in VARIANTS if not name.startswith("swinv2_large_window12to"))
_PUBLISHED = {
    "swin_tiny_patch4_window7_224": "swin-tiny-patch4-window7-224",
    "swin_small_patch4_window7_224": "swin-small-patch4-window7-224",
    "swin_base_patch4_window7_224": "swin-base-patch4-window7-224",
    "swin_large_patch4_window7_224": "swin-large-patch4-window7-224",
    "swinv2_tiny_window8_256": "swinv2-tiny-patch4-window8-256",
    "swinv2_small_window8_256": "swinv2-small-patch4-window8-256",
    "swinv2_base_window8_256": "swinv2-base-patch4-window8-256",
    "swinv2_base_window12to16_192to256": "swinv2-base-patch4-window12to16-192to256-22kto1k-ft",
}
ZOO = (
    *(
        Entry(
            f"timm/{name}",
            "Swin v2" if name.startswith("swinv2") else "Swin S3" if "_s3_" in name else "Swin",
            name,
            reduced=_REDUCED if "large" in name else (),
            image_size=VARIANTS[name]["image_size"][0],
        )
        for name in _CERTIFIED
    ),
    *(
        Entry(
            f"torchvision/{builder}",
            "Swin v2" if "v2" in builder else "Swin",
            builder,
            image_size=VARIANTS[name]["image_size"][0],
            published=f"torchvision://{builder}",
            license="BSD-3-Clause",
        )
        for builder, name in BUILDERS.items()
    ),
    *(_transformers_entry(name, published) for name, published in _PUBLISHED.items()),
)
