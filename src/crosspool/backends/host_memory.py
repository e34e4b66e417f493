"""How much host memory there is for this process: the machine's, or less if a control group limits it."""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MACHINE = Path("/proc/meminfo")

# Limit, usage, and the name in memory.stat of what the kernel would give back first, for control groups of
# version 2 and of version 1. Inside a container the process's own group is at the root of the mount.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)


def total_bytes(cgroups: Path = CGROUPS) -> int:
    """Memory of the machine, or the control group's limit if that is less."""
    return min([_of_machine("MemTotal"), *(limit for limit, _ in _group_limits(cgroups))])


def free_bytes(cgroups: Path = CGROUPS) -> int:
    """Memory that could be allocated now without swapping; file caches count as free."""
    free = [_of_machine("MemAvailable"), *(limit - used for limit, used in _group_limits(cgroups))]
    return max(0, min(free))


def _of_machine(field: str) -> int:
    """Bytes of a field that is in kB (proc_meminfo(5))."""
    fields = dict(line.split(":") for line in MACHINE.read_text().splitlines())
    return int(fields[field].removesuffix("kB")) * 1024


def _group_limits(cgroups: Path) -> list[tuple[int, int]]:
    """(limit, use beyond reclaimable file caches) of the control groups that set a limit."""
    found = []
    for limit_file, usage_file, reclaimable in _FILES:
        try:
            limit = (cgroups / limit_file).read_text().strip()
            usage = int((cgroups / usage_file).read_text())
            stat = (cgroups / usage_file).with_name("memory.stat").read_text()
        except OSError:
            continue
        if limit != "max":
            fields = dict(line.split() for line in stat.splitlines())
            found.append((int(limit), usage - int(fields.get(reclaimable, 0))))
    return found
