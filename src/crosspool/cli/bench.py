"""``crosspool bench``: measure a running server under load."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from crosspool.cli import bench_options as opt
from crosspool.cli.options import DEFAULT_URL, ApiKey, Json, Url
from crosspool.core.errors import ConfigError, CrossPoolError

if TYPE_CHECKING:
    from crosspool.bench.client import Record
    from crosspool.bench.run import Measurement
    from crosspool.bench.server_use import ServerUse

INCOMPLETE = 1


def bench(
    models: opt.Models = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    requests: opt.Requests = None,
    duration: opt.Duration = None,
    rate: opt.Rate = None,
    concurrency: opt.Concurrency = None,
    prompt_tokens: opt.PromptTokens = "512",
    output_tokens: opt.OutputTokens = "128",
    token_ids: opt.TokenIds = "100-20000",
    seed: opt.Seed = 0,
    timeout: opt.Timeout = 600.0,
    server_pid: opt.ServerPid = None,
    as_json: Json = False,
    output: opt.Output = None,
    plot: opt.Plot = None,
) -> None:
    """Measure an OpenAI-compatible server under load: time to first token, time between tokens, throughput.

    Four requests at all times, 100 in all:

        crosspool bench smollm2-135m --concurrency 4 --requests 100

    Two requests a second to each of two models for a minute:

        crosspool bench a b --rate 2 --duration 60 --prompt-tokens 128-1024 --output run.json --plot run.png
    """
    from crosspool.bench.prompts import Span
    from crosspool.bench.run import Load, measure
    from crosspool.bench.server_use import ServerWatch

    load = Load(
        models=tuple(models or ()),
        requests=opt.DEFAULT_REQUESTS if requests is None and duration is None else requests,
        duration=duration,
        rate=rate,
        concurrency=opt.DEFAULT_CONCURRENCY if rate is None and concurrency is None else concurrency,
        prompt_tokens=Span.parse(prompt_tokens, least=1),
        output_tokens=Span.parse(output_tokens, least=1),
        token_ids=Span.parse(token_ids, least=0),
        seed=seed,
        timeout=timeout,
    )
    _check_files(output, plot)
    watch = None if server_pid is None else ServerWatch(server_pid)
    with _Counter() as counter:
        measurement = measure(url, load, api_key=api_key, watch=watch, observe=counter)
    use, about = None if watch is None else watch.use(), _about(api_key)
    _print(measurement, use, about, as_json)
    _write(measurement, use, about, output, plot)
    if measurement.interrupted or not any(record.finished for record in measurement.records):
        raise typer.Exit(INCOMPLETE)


class _Counter:
    """Says in one line of a terminal how far the load has come, and takes it away when left."""

    def __enter__(self) -> _Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._show("")

    def __call__(self, records: Sequence[Record]) -> None:
        ended = sum(record.ended is not None for record in records)
        failed = sum(record.failure is not None for record in records)
        self._show(f"{len(records):,} requests sent, {ended:,} ended, {failed:,} failed; Ctrl-C ends it")

    def _show(self, line: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{line}")
            sys.stderr.flush()


def _check_files(output: Path | None, plot: Path | None) -> None:
    """Raises ConfigError if they could not be written."""
    from crosspool.bench.plot import check_plot

    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"there is no folder {path.parent}")
    if plot is not None:
        check_plot(plot)


def _about(api_key: str | None) -> dict[str, Any]:
    """The command line, the versions, and the machine that the load came from."""
    from dataclasses import asdict

    from crosspool.cli import machine

    return {
        "command": command_line(sys.argv, api_key),
        "versions": machine.find_versions(),
        "machine": {"processor": asdict(machine.find_processor()), "memory": asdict(machine.find_memory())},
    }


def command_line(words: Sequence[str], api_key: str | None) -> str:
    """The command as one types it, without the key."""
    shown = [Path(words[0]).name, *words[1:]]
    if api_key:
        shown = [word.replace(api_key, "KEY") if word.endswith(api_key) else word for word in shown]
    return shlex.join(shown)


def _print(measurement: Measurement, use: ServerUse | None, about: dict[str, Any], as_json: bool) -> None:
    from crosspool.bench import report
    from crosspool.cli.tables import output_console, print_table

    if as_json:
        plain = report.as_plain(measurement, use, about, requests=False)
        typer.echo(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    console, found = output_console(), report.to_show(measurement)
    print_table(console, f"Latency of {measurement.url}", report.LATENCY_COLUMNS, report.latency_rows(found))
    print_table(console, "Requests and tokens", report.COUNT_COLUMNS, report.count_rows(found))
    for note in report.notes(measurement, use):
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _write(
    measurement: Measurement,
    use: ServerUse | None,
    about: dict[str, Any],
    output: Path | None,
    plot: Path | None,
) -> None:
    from crosspool.bench.plot import write_plot
    from crosspool.bench.report import as_plain

    try:
        if output is not None:
            plain = as_plain(measurement, use, about, requests=True)
            output.write_text(json.dumps(plain, ensure_ascii=False) + "\n")
        if plot is not None:
            write_plot(measurement, plot)
    except OSError as error:
        raise CrossPoolError(f"cannot write {error.filename}: {error.strerror}") from error
