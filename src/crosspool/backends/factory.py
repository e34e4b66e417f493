"""From device names to backends."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from crosspool.backends.base import Backend
from crosspool.core.errors import ConfigError

if TYPE_CHECKING:
    from crosspool.backends.cuda import CudaDevice


def are_cuda(names: Sequence[str]) -> bool:
    """Whether these devices are GPUs. Raises ConfigError if some are and some are not."""
    kinds = {name.startswith("cuda") for name in names}
    if len(kinds) > 1:
        raise ConfigError(f"devices of one kind are needed, not {', '.join(names)}")
    return kinds.pop()


def make_cuda_devices(names: Sequence[str]) -> tuple[CudaDevice, ...]:
    """See backends/cuda.py. Only whoever calls this touches CUDA, or needs Triton."""
    try:
        from crosspool.backends import cuda
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"device {names[0]!r} needs the package {error.name}: install crosspool[cuda]"
        ) from error
    return cuda.make_cuda_devices(names)


def make_backends(
    names: Sequence[str], threads: int | None, *, leave_a_core: bool = False
) -> tuple[Backend, ...]:
    """One backend per device name, in order.

    ``threads`` is the number of cores each device may use; None divides the cores that this process may run
    on, and with ``leave_a_core`` each device then computes with one less than its share. Raises ConfigError
    for a name that is no device of this version, or for more threads than cores.
    """
    for name in names:
        _check(name)
    from crosspool.backends.cpu import make_cpu_backends

    numbers = {name: int(name.removeprefix("cpu:")) for name in names}
    return make_cpu_backends(numbers, threads, leave_a_core=leave_a_core)


def _check(name: str) -> None:
    if re.fullmatch(r"cpu:\d{1,4}", name):
        return
    if re.fullmatch(r"[a-z]+(:\d+)?", name) and not name.startswith(("cpu", "cuda")):
        raise ConfigError(
            f"device {name!r} is not supported by this version, which runs on cpu:0, cuda:0, ..."
        )
    raise ConfigError(f"device {name!r} is not a device name; names are like cpu:0 or cuda:0")
