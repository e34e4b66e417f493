"""What this machine offers: found by reading /proc and /sys, and memory bandwidth by measuring it."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from os import sched_getaffinity
from pathlib import Path

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("crosspool", "torch", "transformers", "safetensors", "numpy")

BANDWIDTH_BYTES = 1 << 30
BANDWIDTH_REPEATS = 5
BANDWIDTH_METHOD = (
    "best of 5 passes of numpy.maximum.reduce over int32, one contiguous part of the buffer for each thread"
)


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One node: its processors as the kernel lists them (``0-7,16-23``), and its memory in bytes."""

    node: int
    cpus: str
    memory_bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of memory. ``limit_bytes`` is what this process's control group allows; None: all."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """Measured memory read bandwidth in bytes per second."""

    threads: int
    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Processor:
    """The processor. ``cores`` is how many this process may run on."""

    model: str
    cores: int
    features: dict[str, bool]
    numa_nodes: tuple[NumaNode, ...]


def find_processor(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> Processor:
    model, flags = platform.machine(), set[str]()
    for line in (proc / "cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        match key.strip():
            case "model name":
                model = value.strip()
            case "flags" | "Features":
                flags = set(value.split())
    return Processor(
        model=model,
        cores=len(sched_getaffinity(0)),
        features={name: name in flags for name in CPU_FEATURES},
        numa_nodes=tuple(_numa_nodes(sys / "devices" / "system" / "node")),
    )


def _numa_nodes(folder: Path) -> list[NumaNode]:
    nodes = []
    for path in folder.glob("node[0-9]*"):
        total = next(line for line in (path / "meminfo").read_text().splitlines() if "MemTotal:" in line)
        kib = int(total.split()[-2])
        cpus = (path / "cpulist").read_text().strip()
        nodes.append(NumaNode(int(path.name.removeprefix("node")), cpus, kib * 1024))
    return sorted(nodes, key=lambda node: node.node)


def find_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> Memory:
    import psutil

    memory = psutil.virtual_memory()
    allowed = limit.read_text().strip() if limit.is_file() else "max"
    return Memory(memory.total, memory.available, None if allowed == "max" else int(allowed))


def measure_bandwidth(threads: int, buffer_bytes: int = BANDWIDTH_BYTES) -> Bandwidth:
    """Read ``buffer_bytes`` of memory with so many threads: see BANDWIDTH_METHOD.

    The buffer should be much larger than the processor's caches. numpy lets go of Python's lock meanwhile.
    """
    import numpy as np

    parts = np.array_split(np.ones(buffer_bytes // 4, dtype=np.int32), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(BANDWIDTH_REPEATS):
            begin = time.perf_counter()
            list(pool.map(np.maximum.reduce, parts))
            best = min(best, time.perf_counter() - begin)
    return Bandwidth(threads, sum(part.nbytes for part in parts) / best)


def find_gpus() -> list[str] | None:
    """Name and memory of every NVIDIA GPU, as its driver's tool lists them. None: the tool is not here."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def find_versions() -> dict[str, str]:
    """Installed versions, without importing anything. A package that is missing says so."""
    versions = {"python": platform.python_version(), "kernel": platform.release()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions
