"""`vision_jax configs`: the configs that come with the package."""

import ast

from vision_jax.config import load_config, shipped_configs


def run() -> int:
    """Prints name, task and the first line of each."""
    shipped = shipped_configs()
    width = max(map(len, shipped))
    for name, file in sorted(shipped.items()):
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        task = load_config(str(file), {}).task
        print(f"{name:{width}}  {task:14}  {text.partition(chr(10))[0]}")
    return 0
