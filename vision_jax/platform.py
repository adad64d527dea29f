"""The platform that a program is traced for: whatever form only speed decides asks here."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import jax

ANY = "any"  # no one platform: plain operations
NO_LOOPS = "no loops"  # the same, for formats that have no loops and no branches

WHOLE = "vision_jax."  # before the names of functions that formats may have one operation for

_TRACED_FOR: ContextVar[str] = ContextVar("traced_for", default="")


def current() -> str:
    """ "cpu", "gpu" or "tpu", the default backend, unless programs are traced for another."""
    return _TRACED_FOR.get() or jax.default_backend()


@contextmanager
def traced_for(name: str) -> Iterator[None]:
    """What is traced inside is for this platform."""
    token = _TRACED_FOR.set(name)
    try:
        yield
    finally:
        _TRACED_FOR.reset(token)


def whole(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The function of arrays; where programs are traced for formats, one call that tells its name.

    The name has a dot before it, as no other function's has, so an exporter that knows it can't be
    wrong about what is inside; others see what is inside.
    """

    def inside(*arguments: Any) -> jax.Array:
        return function(*arguments)

    inside.__name__ = WHOLE + function.__name__
    call = jax.jit(inside)

    @wraps(function)
    def either(*arguments: Any) -> jax.Array:
        return (call if current() == NO_LOOPS else function)(*arguments)

    return either
