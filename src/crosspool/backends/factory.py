"""From device names to backends."""

from __future__ import annotations

import re
from collections.abc import Sequence

from crosspool.backends.base import Backend
from crosspool.core.errors import ConfigError


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
    if re.fullmatch(r"[a-z]+(:\d+)?", name) and not name.startswith("cpu"):
        raise ConfigError(
            f"device {name!r} is not supported by this version, which runs on cpu:0, cpu:1, ..."
        )
    raise ConfigError(f"device {name!r} is not a device name; names are like cpu:0")
