"""`python -m vision_jax.convert`: see commands/convert.py."""

import sys

from vision_jax.commands.convert import command

if __name__ == "__main__":
    sys.exit(command())
