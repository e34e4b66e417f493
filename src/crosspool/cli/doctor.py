"""``crosspool doctor``: what this machine offers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crosspool.cli.options import Json

if TYPE_CHECKING:
    from crosspool.cli.machine import Bandwidth, Memory, Processor

MEMORY_SHARE = 4
"""The bandwidth buffer takes at most one part in so many of the memory that is available."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that doctor finds. ``gpus`` None: no tool to ask; ``demo_zoo`` None: not built."""

    processor: Processor
    memory: Memory
    bandwidth: tuple[Bandwidth, ...]
    gpus: list[str] | None
    versions: dict[str, str]
    demo_zoo: str | None


def doctor(
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth/--no-bandwidth", help="Measure memory bandwidth (a few seconds).")
    ] = True,
    as_json: Json = False,
) -> None:
    """Show what this machine offers: cores, memory and its bandwidth, GPUs, versions.

    All of it:

        crosspool doctor

    Without the measurement, for a program to read:

        crosspool doctor --no-bandwidth --json
    """
    report = examine(bandwidth)
    if as_json:
        typer.echo(json.dumps(as_plain(report), indent=2))
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for name, value in lines(report):
        console.print(f"[bold]{name:<18}[/bold]", end="")
        console.print(value, markup=False)


def examine(bandwidth: bool) -> Report:
    from crosspool.cli import machine
    from crosspool.demo.zoo import default_zoo_path, open_zoo

    processor, memory = machine.find_processor(), machine.find_memory()
    size = min(machine.BANDWIDTH_BYTES, memory.available_bytes // MEMORY_SHARE)
    counts = sorted({1, processor.cores}) if bandwidth else []
    zoo = open_zoo(default_zoo_path())
    return Report(
        processor=processor,
        memory=memory,
        bandwidth=tuple(machine.measure_bandwidth(threads, size) for threads in counts),
        gpus=machine.find_gpus(),
        versions=machine.find_versions(),
        demo_zoo=None if zoo is None else str(zoo.path),
    )


def as_plain(report: Report) -> dict[str, Any]:
    from crosspool.cli.machine import BANDWIDTH_METHOD

    return {**asdict(report), "bandwidth_method": BANDWIDTH_METHOD}


def lines(report: Report) -> list[tuple[str, str]]:
    """What to print: a label and a value for each line."""
    from crosspool.cli.machine import BANDWIDTH_METHOD
    from crosspool.cli.sizes import format_bytes

    processor, memory = report.processor, report.memory
    have = [name for name, there in processor.features.items() if there]
    lack = [name for name, there in processor.features.items() if not there]
    limit = "" if memory.limit_bytes is None else f", limited to {format_bytes(memory.limit_bytes)}"
    found = [
        ("processor", f"{processor.model}, {processor.cores} cores to run on"),
        ("instructions", f"{', '.join(have) or 'none of interest'}; without {', '.join(lack) or 'nothing'}"),
    ]
    found += [
        (f"NUMA node {node.node}", f"cores {node.cpus or 'none'}, {format_bytes(node.memory_bytes)}")
        for node in processor.numa_nodes
    ]
    free = f"{format_bytes(memory.total_bytes)}, {format_bytes(memory.available_bytes)} available{limit}"
    found.append(("memory", free))
    for result in report.bandwidth:
        threads = "1 thread" if result.threads == 1 else f"{result.threads} threads"
        found.append(("memory reads", f"{result.bytes_per_second / 1e9:.1f} GB/s with {threads}"))
    if report.bandwidth:
        found.append(("", f"({BANDWIDTH_METHOD})"))
    found.append(("GPUs", _gpus(report.gpus)))
    found += list(report.versions.items())
    found.append(("demo zoo", report.demo_zoo or "not built; build it with: crosspool demo build"))
    return found


def _gpus(gpus: list[str] | None) -> str:
    if gpus is None:
        return "none seen (there is no nvidia-smi)"
    if not gpus:
        return "none seen by nvidia-smi"
    return f"{'; '.join(gpus)} (this version computes on the CPU only)"
