"""What commands with flags of their own share."""

import argparse
import signal
import sys
from collections.abc import Callable

from vision_jax.errors import UserError

BAD_INPUT = 2  # exit code


class Parser(argparse.ArgumentParser):
    """Reports a bad flag in one line, like every other bad input."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def make_parser(prog: str, description: str | None) -> Parser:
    """A parser whose --help is the command's docstring, as it stands there."""
    return Parser(
        prog=prog,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of "480,640", "480x640" or, a square, "480"; the type of a flag."""
    sides = text.replace("x", ",").split(",")
    if not 1 <= len(sides) <= 2 or not all(side.isdigit() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"{text!r} is no height and width, such as 480,640")
    return int(sides[0]), int(sides[-1])


def seed(text: str) -> int:
    """From 0 up to 2**32 - 1; the type of a flag."""
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 up to 2**32 - 1")
    return int(text)


def run(command: Callable[[], int], too_large: str, *, at_once: bool = True) -> int:
    """Runs a command; returns its exit code, 2 for bad input, 128 + n after signal n.

    Args:
      command: the whole of it; KeyboardInterrupt(n) says that signal n stopped it.
      too_large: for which memory is not enough, as the end of a sentence.
      at_once: whether it writes all that it writes at its end.
    """
    try:
        return command()
    except (UserError, OSError) as error:  # what the operating system refuses is its user's too
        print(f"error: {error}", file=sys.stderr)
    except MemoryError:
        print(f"error: not enough memory for {too_large}", file=sys.stderr)
    except KeyboardInterrupt as stop:
        print("stopped; nothing was written" if at_once else "stopped", file=sys.stderr)
        return 128 + (stop.args[0] if stop.args else signal.SIGINT)
    return BAD_INPUT
