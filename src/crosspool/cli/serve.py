"""``crosspool serve``: models behind one OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crosspool.cli import serve_options as options
from crosspool.core.config import MILLISECOND
from crosspool.core.errors import ConfigError

if TYPE_CHECKING:
    from crosspool.cli.settings import ModelEntry, Settings


def serve(
    models: options.Models = None,
    config: options.Config = None,
    demo: options.Demo = False,
    demo_dir: options.DemoDir = None,
    dtype: options.Dtype = "auto",
    weights_dtype: options.WeightsDtype = "auto",
    kv_pool_bytes: options.KvPool = None,
    kv_pool_fraction: options.KvFraction = None,
    kv_pool: options.KvPoolFrom = None,
    plan: options.Plan = None,
    weights_pool_bytes: options.WeightsPool = None,
    page_bytes: options.PageBytes = None,
    device_memory: options.DeviceBytes = None,
    weights_memory: options.WeightsMemoryOption = None,
    prefix_cache: options.PrefixCache = None,
    spill_bytes: options.SpillBytes = None,
    kv_devices: options.KvDevices = None,
    weights_devices: options.WeightsDevices = None,
    ffn_sharding: options.FfnSharding = None,
    mode: options.ModeOption = None,
    threads: options.Threads = None,
    kernels: options.KernelsOption = None,
    ttft_target_ms: options.TtftTarget = None,
    tbt_target_ms: options.TbtTarget = None,
    host: options.Host = None,
    port: options.Port = None,
    api_key: options.Key = None,
    as_json: options.Json = False,
) -> None:
    """Serve models behind one OpenAI-compatible endpoint, until Ctrl-C or SIGTERM.

    The demo models:

        crosspool serve --demo

    Two checkpoints, one under another name, with sizes for both pools:

        crosspool serve models/qwen3 small=models/smollm2 --kv-pool-bytes 4GiB --weights-pool-bytes 60GiB

    Everything in one file, but on another port:

        crosspool serve --config zoo.toml --port 9000

    A KV pool as planned:

        crosspool serve models/qwen3 models/glm --kv-pool plan --plan plan.json

    KV and weights on separate devices, each a team of pinned cores:

        crosspool serve --demo --kv-devices cpu:0 --weights-devices cpu:1
    """
    from crosspool.cli.settings import Settings
    from crosspool.cli.zoo_file import read_zoo_file

    base = Settings() if config is None else read_zoo_file(config)
    given = Settings(
        models=_entries(models or [], demo, demo_dir),
        pools=_pools(
            kv_pool_bytes,
            kv_pool_fraction,
            weights_pool_bytes=weights_pool_bytes,
            page_bytes=page_bytes,
            device_bytes=device_memory,
            weights_memory=weights_memory,
            prefix_cache=prefix_cache,
            spill_bytes=spill_bytes,
        ),
        devices=_given(
            kv_devices=_devices(kv_devices),
            weights_devices=_devices(weights_devices),
            sharding=ffn_sharding,
            mode=mode,
            threads=threads,
            kernels=kernels,
        ),
        scheduler=_given(ttft_target=_nanoseconds(ttft_target_ms), tbt_target=_nanoseconds(tbt_target_ms)),
        server=_given(host=host, port=port, api_key=api_key),
    )
    settings = given.over(_planned(kv_pool, plan, given, base))
    if not settings.models:
        raise ConfigError("no model to serve: give a MODEL, --config or --demo (see crosspool serve --help)")
    _run(settings, dtype, weights_dtype, as_json)


def _devices(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(device.strip() for device in text.split(","))


def _nanoseconds(milliseconds: float | None) -> int | None:
    return None if milliseconds is None else round(milliseconds * MILLISECOND)


def _given(**settings: Any) -> dict[str, Any]:
    """The settings that were given on the command line."""
    return {name: value for name, value in settings.items() if value is not None}


def _pools(kv_bytes: int | None, kv_fraction: float | None, **others: Any) -> dict[str, Any]:
    if kv_bytes is not None and kv_fraction is not None:
        raise ConfigError("give --kv-pool-bytes or --kv-pool-fraction, not both")
    pools = _given(kv_pool_bytes=kv_bytes, **others)
    if kv_fraction is None:
        return pools
    return {**pools, "kv_pool_fraction": kv_fraction, "kv_pool_bytes": None}


def _planned(kv_pool: str | None, plan: Path | None, given: Settings, base: Settings) -> Settings:
    """``base``, with what a plan says in place of its own."""
    from crosspool.cli.planned import planned_settings

    if kv_pool is None and plan is None:
        return base
    if kv_pool != "plan" or plan is None:
        raise ConfigError(
            "--kv-pool plan and --plan FILE belong together; a size is given by --kv-pool-bytes"
        )
    if given.pools.keys() & {"kv_pool_bytes", "kv_pool_fraction"}:
        raise ConfigError("give --kv-pool plan, --kv-pool-bytes or --kv-pool-fraction, only one of them")
    return planned_settings(plan, base.models + given.models).over(base)


def _entries(places: list[str], demo: bool, demo_dir: Path | None) -> tuple[ModelEntry, ...]:
    """The models named on the command line, and those of the demo zoo."""
    from crosspool.cli.demo import ensure_zoo
    from crosspool.cli.settings import ModelEntry
    from crosspool.llm.options import split_name

    entries = [ModelEntry(place=place, base=Path.cwd(), name=name) for name, place in map(split_name, places)]
    if demo:
        zoo = ensure_zoo(demo_dir)
        entries += [ModelEntry(place=str(zoo.folder(model)), base=zoo.path) for model in zoo.models]
    return tuple(entries)


def _run(settings: Settings, dtype: str, weights_dtype: str, as_json: bool) -> None:
    """Serve until told to end. The summary goes to standard output, progress to standard error."""
    from rich.console import Console

    from crosspool.cli.progress import LoadBars
    from crosspool.cli.summary import json_summary, print_summary
    from crosspool.core.info import EngineInfo
    from crosspool.server.run import serve as run_server

    server = settings.server_config()
    engine = settings.engine_config(dtype, weights_dtype)
    with LoadBars(Console(stderr=True), "Loaded") as bars:

        def on_ready(info: EngineInfo, url: str) -> None:
            bars.stop()
            if as_json:
                typer.echo(json_summary(info, url))
            else:
                print_summary(info, server, url)

        raise typer.Exit(run_server(engine, server, progress=bars, on_ready=on_ready))
