"""What patches have in common, in colors."""

from vision_jax.tasks.patches import color_patches, draw_patches

__all__ = ["color_patches", "draw_patches"]
