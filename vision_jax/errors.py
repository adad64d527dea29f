"""The one exception that is meant for a person rather than for a programmer."""

import difflib
from collections.abc import Sequence

LONGEST = 2000  # characters of a message


class UserError(ValueError):
    """Bad input that its user can mend: a file, a config field, a tensor.

    The message is one line that names the thing and says what to do next. `main` prints it without
    a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        text = super().__str__()
        half = LONGEST // 2  # names may have megabytes; what to do next stands at the end
        cut = text if len(text) <= LONGEST else f"{text[:half]} ... {text[-half:]}"
        return printable(cut)


class DivergedError(UserError):
    """What a model computes in an evaluation is not finite."""


def printable(text: str) -> str:
    r"""Text on one line, with what a terminal would obey or can't show spelled out.

    Names of files and classes are not trusted: they may hold a terminal's escapes, line breaks,
    marks that turn the direction of writing, and bytes or halves of characters that have no UTF-8.

    Examples:
      >>> printable("a\x1b[31m\n\udc80")
      'a\\x1b[31m\\n\\udc80'
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def utf8(name: str) -> str:
    r"""A name as UTF-8 can hold it, for files that other programs read.

    Systems allow any bytes in names. Python keeps those that are no UTF-8 as halves of characters,
    which JSON can't hold; here they are spelled out.

    Examples:
      >>> utf8("bad\udcff.png")
      'bad\\xff.png'
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class UserErrors(UserError):
    """Several faults of one input, found together, so that they can be mended together.

    Attributes:
      each: one line for each, which `main` prints each on a line of its own.
    """

    def __init__(self, messages: Sequence[str]):
        self.each = tuple(UserError(message) for message in messages)
        super().__init__("; ".join(messages))


def nearest(name: str, names: Sequence[str]) -> str:
    """A clause that suggests the nearest name, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean `{near[0]}`?" if near else ""
