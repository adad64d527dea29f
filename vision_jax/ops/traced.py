"""Numbers of a config that a program takes as arguments, as a search's do (search/trial.py).

While such a program is built nobody knows them. Whoever traces a number has checked its range at
both ends, and traces none that is 0, which often turns something off.
"""

from typing import Any

import jax


def is_known(*values: Any) -> bool:
    """Whether none of the numbers is traced: only then can their range be checked.

    Examples:
      >>> is_known(0.1, 2)
      True
    """
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def is_on(value: Any) -> bool:
    """Whether a number is on that 0 turns off; a traced one is.

    Examples:
      >>> is_on(0.0), is_on(0.1)
      (False, True)
    """
    return not is_known(value) or value > 0
