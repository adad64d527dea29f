"""The platform that a program is traced for: whatever form only speed decides asks here."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

ANY = "any"  # no one platform: plain operations
NO_LOOPS = "no loops"  # the same, for formats that have no loops and no branches

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
