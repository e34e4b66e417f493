"""The options of ``crosspool serve``, as typer reads them from annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crosspool.cli.sizes import read_size
from crosspool.core.config import Kernels, Mode, WeightsMemory
from crosspool.core.topology import Sharding

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL",
        help="A folder with a checkpoint, name=folder, or a hub id such as Qwen/Qwen3-30B-A3B.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None, typer.Option(help="A zoo file (TOML) with models and settings; options given here go first.")
]
Demo = Annotated[bool, typer.Option("--demo", help="Serve the demo zoo, building it if need be.")]
DemoDir = Annotated[Path | None, typer.Option(help="Where the demo zoo is, if not in the user's cache.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto (as stored), float32, bfloat16 or float16, for models whose zoo file says nothing."
    ),
]
WeightsDtype = Annotated[
    str,
    typer.Option(
        help="auto (as --dtype; FFNs that are stored in float8 stay so on GPUs), or what weights become "
        "as they load: int8 (CPUs: projections, experts, LM heads) or float8 (GPUs: experts, other FFNs). "
        "For models whose zoo file says nothing."
    ),
]
WeightsMemoryOption = Annotated[
    WeightsMemory | None,
    typer.Option(
        "--weights-memory",
        help="Read weights from the checkpoint's mapped files, or copy them into huge pages.",
        show_default="mapped",
    ),
]
KvPool = Annotated[
    int | None,
    typer.Option(
        parser=read_size, metavar="SIZE", help="KV pool, all devices together: 2GiB, 500MB or bytes."
    ),
]
KvPoolFrom = Annotated[
    str | None,
    typer.Option(
        "--kv-pool", metavar="plan", help="Take the KV pool's size, pages and admission from --plan FILE."
    ),
]
Plan = Annotated[Path | None, typer.Option(metavar="FILE", help="What crosspool plan --save wrote.")]
KvFraction = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="KV pool, as a share of the memory that the weights leave free."),
]
WeightsPool = Annotated[
    int | None,
    typer.Option(
        parser=read_size, metavar="SIZE", help="Weights pool, all devices together: 2GiB, 500MB or bytes."
    ),
]
PageBytes = Annotated[
    int | None,
    typer.Option(parser=read_size, metavar="SIZE", help="A KV page; by default chosen from the models."),
]
PrefixCache = Annotated[
    bool | None,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        help="Keep what was computed in KV pages that nobody needs, for prompts that begin alike.",
        show_default="prefix-cache",
    ),
]
SpillBytes = Annotated[
    int | None,
    typer.Option(
        parser=read_size,
        metavar="SIZE",
        help="Host memory for KV pages of preempted sequences; 0 for none.",
        show_default="as much as the KV pool, or a quarter of the memory left if that is less",
    ),
]
KvDevices = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Devices of the KV pool, for instance cpu:0 or cuda:0."),
]
WeightsDevices = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Devices of the weights pool, for instance cpu:1,cpu:2."),
]
FfnSharding = Annotated[
    Sharding | None,
    typer.Option(help="How FFNs are spread over several weights devices.", show_default="layer"),
]
ModeOption = Annotated[
    Mode | None,
    typer.Option(
        "--mode",
        help="Two pools, or, to compare with, each model wholly on one device (with ffn_sharding tensor, in "
        "parts on all), where its KV is elastic (monolithic) or has a fixed share (static).",
        show_default="crosspool",
    ),
]
DeviceBytes = Annotated[
    int | None,
    typer.Option(
        "--device-memory",
        parser=read_size,
        metavar="SIZE",
        help="Memory of each device; KV gets what the weights on a KV device leave of it.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="Cores that each device computes with; by default its share of the cores."),
]
KernelsOption = Annotated[
    Kernels | None,
    typer.Option(
        "--kernels", help="What computes: resident compiled code, or plain torch.", show_default="compiled"
    ),
]
TtftTarget = Annotated[float | None, typer.Option(metavar="MS", help="Aim for the time to the first token.")]
TbtTarget = Annotated[float | None, typer.Option(metavar="MS", help="Aim for the time between tokens.")]
Host = Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")]
Port = Annotated[int | None, typer.Option(help="Port to listen on.", show_default="8000")]
Key = Annotated[
    str | None,
    typer.Option(help="Ask clients for this key. A zoo file keeps it out of the list of processes."),
]
Json = Annotated[bool, typer.Option("--json", help="When ready, print models and pools as one line of JSON.")]
