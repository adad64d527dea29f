"""The one exception that is meant for a person rather than for a programmer."""

import difflib
from collections.abc import Sequence


class UserError(ValueError):
    """Bad input that its user can mend: a file, a config field, a tensor.

    The message is one line that names the thing and says what to do next. `main` prints it without
    a traceback and exits with code 2.
    """


def nearest(name: str, names: Sequence[str]) -> str:
    """A clause that suggests the nearest name, or nothing."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean `{near[0]}`?" if near else ""
