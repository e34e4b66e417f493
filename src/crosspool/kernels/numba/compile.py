"""How kernels are compiled: without the GIL, exactly as written, and once for each machine."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding
import numba

from crosspool.kernels.numba.sources import digest_of

Function = TypeVar("Function", bound=Callable[..., Any])

ENTRY_ARGUMENTS = 9
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


def kernel(function: Function) -> Function:
    """Compile ``function`` when it is first called, and keep the machine code in the user's cache folder.

    Floating point is exact: sums keep their order, so that a row's result never depends on how many others
    are computed with it. A division by zero gives infinity, as in numpy.
    """
    with _into_cache_folder(function):
        compiled: Function = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        return compiled


def inline(function: Function) -> Function:
    """Like ``kernel``, for small functions that only kernels call: they become part of their callers."""
    compiled: Function = numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)
    return compiled


class Entry:
    """A function that compiled code calls by its address (intrinsics.call_entry), compiled apart from its
    callers: they neither wait for its compilation nor contain it.

    It takes ENTRY_ARGUMENTS int64 and returns one.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: Any = None
        self.__doc__ = function.__doc__

    @property
    def name(self) -> str:
        return self._function.__name__

    @property
    def address(self) -> int:
        """Compiled at the first call, or taken from the cache folder."""
        if self._compiled is None:
            with _into_cache_folder(self._function):
                signature = numba.types.int64(*[numba.types.int64] * ENTRY_ARGUMENTS)
                self._compiled = numba.cfunc(signature, cache=True, nopython=True, error_model="numpy")(
                    self._function
                )
        return int(self._compiled.address)


@contextmanager
def _into_cache_folder(function: Callable[..., Any]) -> Iterator[None]:
    """Numba keeps what it makes of ``function`` in its ``cache_folder``."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder(Path(function.__code__.co_filename)))
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


@cache
def cache_folder(file: Path) -> Path:
    """Where this machine's code from a file and all that it imports is kept; a temporary folder if nowhere
    else."""
    folder = Path.home() / ".cache" / "crosspool" / "kernels" / _key(file)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="crosspool-kernels-"))


@cache
def cpu_features() -> frozenset[str]:
    """What this machine's CPU can do and the system lets this process use, by LLVM's names."""
    features = llvmlite.binding.get_host_cpu_features()
    there = frozenset(name for name, there in features.items() if there)
    return there if _may_use_tiles() else there - {"amx-tile", "amx-bf16", "amx-int8", "amx-fp16"}


def _may_use_tiles() -> bool:
    """Ask Linux for the matrix unit, for this process and all its threads (arch_prctl(2))."""
    if platform.machine() != "x86_64":
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)


def _key(file: Path) -> str:
    """Of the sources, the CPU and the versions that machine code depends on."""
    digest = hashlib.sha256(digest_of(file))
    for part in (sys.version, numba.__version__, llvmlite.__version__, llvmlite.binding.get_host_cpu_name()):
        digest.update(part.encode() + b"\0")
    digest.update(",".join(sorted(cpu_features())).encode())
    return digest.hexdigest()[:16]
