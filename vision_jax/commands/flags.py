"""What commands with flags of their own share."""

import argparse

from vision_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line, like every other bad input."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")
