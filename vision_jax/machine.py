"""What a process sets on its machine before JAX computes: nothing of it changes a result.

Programs that were compiled once are kept on disk, and on a CPU the memory of one step is kept for
the next; each has a flag that leaves it be. `jit` compiles whole programs with what suits the
platform.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

CACHE_BYTES = 2 * 2**30  # the programs used longest ago make room
CACHED_SECONDS = 0.3  # what compiles faster isn't worth a file
GROWTH = 1.3  # more than this is one more place for a step's memory
MOST_TIMES = 4  # that a run gives memory back for it

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_MOST = 2**31 - 1
# Of a container, versions 2 and 1: its bound of memory, its use, and what of that are files that
# the system drops when it needs the place.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.", "max", "current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.", "limit_in_bytes", "usage_in_bytes", "total_inactive_file"),
)
_KEPT: set[int] = set()  # the process that keeps its memory: its allocator can't be asked


def keep_compiled() -> Path | None:
    """Keeps compiled programs in the user's cache folder; the folder, or None if it is not ours.

    JAX names a program by itself, its options, the device and the versions of JAX and XLA. Code for
    a CPU is for this kind of CPU, so each kind has a folder of its own: home folders are shared.
    What JAX_COMPILATION_CACHE_DIR or a config of JAX's says comes first.
    """
    import jax

    from vision_jax.files import user_cache

    if jax.config.values["jax_compilation_cache_dir"]:
        return None
    folder = user_cache("compiled") / _kind_of_cpu()
    if _has_a_name():
        _remove_unfinished(folder)
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_SECONDS)
    return folder


def _has_a_name() -> bool:
    """Whether the user has an entry in /etc/passwd; one that a container is told of has none.

    A cache with a bound looks up who owns its files, and where it can't it keeps nothing and warns
    of each program (findings/jax_bounded_cache_without_a_name.sh).
    """
    try:
        import pwd
    except ImportError:  # of Unix alone
        return True
    try:
        return bool(pwd.getpwuid(os.getuid()))
    except KeyError:
        return False


def _remove_unfinished(folder: Path) -> None:
    """Removes what a killed process began to write: JAX would warn of it in each run from then on.

    JAX holds a lock while it writes a program and then the time of its last use beside it, in a
    cache with a bound.
    """
    if not folder.is_dir():
        return
    # What cannot be removed costs a warning.
    with contextlib.suppress(OSError, Timeout), FileLock(folder / ".lockfile", timeout=5):
        for program in folder.glob("*-cache"):
            if not program.with_name(program.name.removesuffix("-cache") + "-atime").exists():
                program.unlink()


def keep_memory(one_heap: bool = True) -> bool:
    """Lets the process keep freed memory, for the next step; whether it does.

    XLA's CPU client allocates a step's temporaries anew each time. glibc would ask the system for
    a block of their size and give it back, and the system fills each page with zeros: 82,000 a step
    of configs/vit_lora.py, a quarter of its time. Where JAX may find another device, with other C
    libraries, and where the environment says something of the allocator, nothing is changed.

    Nor is it after JAX was imported: a thread that allocates has a heap of its own from then on.

    Programs then run in the thread that calls them. A thread of XLA's says that a step has ended
    before it frees what the step has used, so that the next one would take a second place.

    Args:
      one_heap: of all threads. A thread's own is small, and what is larger comes from the system,
        so programs on several devices need one. Where another thread reads small images all the
        time they lie between a program's temporaries, whose place then moves: a watch takes a
        tenth longer.
    """
    libc = _glibc()
    if libc is None or "jax" in sys.modules or _may_find_accelerator():
        return False
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")) for name in os.environ):
        return False
    settings = [(_MMAP_THRESHOLD, _MOST), (_TRIM_THRESHOLD, _MOST)]
    settings += [(_ARENA_MAX, 1)] if one_heap else []
    if not all(libc.mallopt(name, value) for name, value in settings):
        return False
    _KEPT.add(os.getpid())
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def is_cpu() -> bool:
    """Whether JAX computes on the CPU."""
    import jax

    return jax.default_backend() == "cpu"


def wait_on_cpu(results: Any) -> None:
    """Waits until a step has ended, where the next one would take memory of its own meanwhile.

    On a CPU there is nothing to gain from a step that begins early: it waits for the cores.
    """
    import jax

    if jax.default_backend() == "cpu":
        jax.block_until_ready(results)


def give_back_memory() -> None:
    """Gives freed memory back to the system, where something else begins that needs other sizes.

    Without it, a process that trains and evaluates by turns would hold the memory of both. Nothing
    happens where `keep_memory` did nothing.
    """
    if os.getpid() in _KEPT:
        ctypes.CDLL(None).malloc_trim(0)


def compile_apart(program: Any, tell: Callable[..., None] | None = None) -> Callable[..., Any]:
    """The program of `jit`, which gives back what compiling it uses before it takes its own memory.

    It is compiled anew for other shapes of its last argument alone. `tell` is called once, between
    the first compilation and the first run, with what was compiled and the arguments; not of a
    function around a program, which cannot be compiled apart.
    """
    compiled: set[Any] = set()

    def call(*arguments: Any) -> Any:
        import jax

        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(arguments[-1]))
        wanted = os.getpid() in _KEPT or (tell is not None and hasattr(program, "lower"))
        if wanted and shapes not in compiled:
            made = program.lower(*arguments).compile()  # JAX has it for the call
            if tell is not None and not compiled:
                tell(made, *arguments)
            give_back_memory()
            compiled.add(shapes)
        return program(*arguments)

    return call


class MemoryWatch:
    """Gives memory back when a process that does the same again and again holds more than before.

    A small block that settles where a large one was makes the next large one take another place.
    The system gets the old place back. That step loses the time that keeping memory saves.
    """

    def __init__(self) -> None:
        self._usual = 0
        self._left = MOST_TIMES

    def check(self) -> None:
        """To be called once a step."""
        now = _resident_bytes()
        if self._usual == 0 or self._left == 0:
            self._usual = self._usual or now
            return
        if now > GROWTH * self._usual:
            give_back_memory()
            self._left -= 1
            if _resident_bytes() > GROWTH * self._usual:
                self._usual = now  # it is needed


def jit(function: Callable[..., Any], **keywords: Any) -> Any:
    """`jax.jit` of a whole program, one that runs for long and is called by no other.

    On a CPU its operations stand in the order that needs the least memory. As it is, XLA starts
    whatever can be started, so that several threads find work: the copies of an image that the
    gradient of each convolution's kernel multiplies are all made before the first is used.
    """
    import jax

    options = _in_order() if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options, **keywords)


@cache
def _in_order() -> dict[str, Any] | None:
    """XLA's option for it, or None where this version has none of that name."""
    import jax

    options = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def _resident_bytes() -> int:
    """Memory of this process now; 0 where the system doesn't say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def available_bytes() -> int | None:
    """Memory that this process may still take, by the system and its container's bound (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    except OSError:
        free = []
    for path, limit, used, reclaimed in _CGROUPS:
        with contextlib.suppress(OSError, ValueError, KeyError):  # "max" is no bound
            bound, held = (int(Path(path + name).read_text()) for name in (limit, used))
            lines = Path(path + "stat").read_text().splitlines()
            free.append(bound - held + int(dict(line.split() for line in lines)[reclaimed]))
    return max(0, min(free)) if free else None


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)


def _may_find_accelerator() -> bool:
    """Whether JAX will look for one: what it finds it tells only after its threads have begun."""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if wanted:
        return wanted != "cpu"
    packages = ("jax_plugins", "libtpu")
    found = any(importlib.util.find_spec(name) is not None for name in packages)
    return found or bool(entry_points(group="jax_plugins"))


def _kind_of_cpu() -> str:
    """Architecture and a digest of what the CPU can do, "x86_64-1f2e3d4c"."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    said = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return f"{platform.machine()}-{hashlib.sha256(''.join(said).encode()).hexdigest()[:8]}"
