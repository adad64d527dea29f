"""Prints every field of a config, with its value and a line of help.

    python -m vision_jax.config
    python -m vision_jax.config detection
    python -m vision_jax.config configs/vit_lora.py

A task (classification by default) gives the defaults; a config file what it makes of them, with a
star at what it changes. Any field is set with --config.FIELD=VALUE on a command line.
"""

import argparse
import sys
from collections.abc import Sequence

from vision_jax.config import TASKS, default_config, fields, fields_of, read_config
from vision_jax.config.fields import CLASSIFICATION
from vision_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vision_jax.config",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", default=CLASSIFICATION, help="a task or a config file")
    given = parser.parse_args(arguments).config
    try:
        config = default_config(given) if given in TASKS else read_config(given, {})[0]
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    values = fields(config)
    for name, field in fields_of(config.task).items():
        mark = " " if values[name] == field.default else "*"
        print(f"{mark} {f'{name} = {values[name]!r}':44}  # {field.help}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
