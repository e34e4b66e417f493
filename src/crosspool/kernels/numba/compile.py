"""How kernels are compiled: without the GIL, exactly as written, and once for each machine."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import llvmlite
import llvmlite.binding
import numba

Function = TypeVar("Function", bound=Callable[..., Any])

PACKAGE = Path(__file__).parents[2]
SOURCES = ("kernels/numba", "workers/resident", "core/pick.py")
"""What compiled code is made of, below the package: Numba itself sees edits only in the file it compiles."""


def kernel(function: Function) -> Function:
    """Compile ``function`` when it is first called, and keep the machine code in the user's cache folder.

    Floating point is exact: sums keep their order, so that a row's result never depends on how many others
    are computed with it. A division by zero gives infinity, as in numpy.
    """
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(cache_folder())
    try:
        compiled: Function = numba.njit(nogil=True, cache=True, error_model="numpy")(function)
        return compiled
    finally:
        numba.config.CACHE_DIR = before


def inline(function: Function) -> Function:
    """Like ``kernel``, for small functions that only kernels call: they become part of their callers."""
    compiled: Function = numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)
    return compiled


@cache
def cache_folder() -> Path:
    """Where this machine's code from these very sources is kept; a temporary folder if nowhere else."""
    folder = Path.home() / ".cache" / "crosspool" / "kernels" / _key()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="crosspool-kernels-"))


@cache
def cpu_features() -> frozenset[str]:
    """What this machine's CPU can do, by LLVM's names."""
    features = llvmlite.binding.get_host_cpu_features()
    return frozenset(name for name, there in features.items() if there)


def _key() -> str:
    """Of the sources, the CPU and the versions that machine code depends on."""
    digest = hashlib.sha256()
    for part in (sys.version, numba.__version__, llvmlite.__version__, llvmlite.binding.get_host_cpu_name()):
        digest.update(part.encode() + b"\0")
    digest.update(",".join(sorted(cpu_features())).encode())
    for source in SOURCES:
        path = PACKAGE / source
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
