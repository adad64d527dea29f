"""Fine-tune large vision models in JAX, from anybody's PyTorch weights."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_jax.loaded import (
        Loaded,
        Padded,
        evaluate,
        export_adapter,
        import_adapter,
        load,
        save,
    )

__version__ = "0.2.0"
__all__ = ["Loaded", "Padded", "evaluate", "export_adapter", "import_adapter", "load", "save"]


def __getattr__(name: str) -> Any:
    # Imported when they are used: commands answer bad flags before JAX is there.
    if name in __all__:
        return getattr(importlib.import_module("vision_jax.loaded"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
