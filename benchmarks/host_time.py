"""Processor time of everything but the computing teams, for each token of streams over HTTP.

    python benchmarks/host_time.py FOLDER [--tokens 1000] [--streams 1] [--rounds 3]

Starts ``crosspool serve`` and reads the scheduler's account of each thread (/proc/PID/task/TID/schedstat)
before and after the tokens. The team's threads are the busiest of the engine process, as many as
``--threads`` says. Figures are microseconds a token: of the rest of the engine process, by thread, and of the
API process.
With ``--source`` the sources of another checkout serve; give it several times, for A B A B.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
from machine import describe
from peers.process import free_port

WARM_TOKENS = 50
READY_SECONDS = 300
MODEL = "it"

ThreadTimes = Mapping[int, int]
"""Nanoseconds on a processor by thread id."""


@dataclass(frozen=True, slots=True)
class Round:
    """Microseconds a token; ``rest`` are the engine process's threads but the team's, busiest first."""

    rest: tuple[float, ...]
    api: float
    tokens_per_second: float

    def line(self) -> str:
        threads = ", ".join(f"{time:.1f}" for time in self.rest if time >= 0.05)
        return (
            f"engine process {sum(self.rest):.1f} us (by thread: {threads}), API process {self.api:.1f} us, "
            f"{self.tokens_per_second:.1f} tokens/s"
        )


@dataclass(frozen=True, slots=True)
class Server:
    port: int
    api: int
    cell: int
    threads: int


@contextmanager
def serve(folder: str, source: Path, threads: int) -> Iterator[Server]:
    """A server of one model; ``source`` is the folder that contains the package."""
    port = free_port()
    command = [sys.executable, "-c", "from crosspool.cli.app import app; app()"]
    options = [
        "serve",
        f"{MODEL}={folder}",
        "--port",
        port,
        "--threads",
        threads,
        "--kv-pool-bytes",
        "512MiB",
    ]
    process = subprocess.Popen(
        [*command, *map(str, options)],
        env={**os.environ, "PYTHONPATH": str(source)},
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait_until_ready(port, process)
        cells = [p for p in psutil.Process(process.pid).children() if "crosspool.server.cell" in p.cmdline()]
        yield Server(port, process.pid, cells[0].pid, threads)
    finally:
        process.terminate()
        process.wait()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.1)
    raise SystemExit("the server does not come up")


def thread_times(pid: int) -> ThreadTimes:
    times = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):
            times[int(task.name)] = int((task / "schedstat").read_text().split()[0])
    return times


def spent(before: ThreadTimes, after: ThreadTimes) -> list[int]:
    """Most first."""
    return sorted((time - before.get(thread, 0) for thread, time in after.items()), reverse=True)


def open_stream(port: int, tokens: int, rng: random.Random) -> http.client.HTTPResponse:
    body = {
        "model": MODEL,
        "prompt": [rng.randrange(1000, 20000) for _ in range(32)],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise SystemExit(response.read().decode())
    return response


def read_events(responses: list[http.client.HTTPResponse], count: int) -> None:
    """``count`` events of each stream, in turn."""
    for _ in range(count):
        for response in responses:
            while not (line := response.readline()).startswith(b"data:"):
                if not line:
                    raise SystemExit("a stream ended early")


def measure(server: Server, streams: int, tokens: int, seed: int) -> Round:
    rng = random.Random(seed)
    asked = WARM_TOKENS + tokens + 2 * WARM_TOKENS
    responses = [open_stream(server.port, asked, rng) for _ in range(streams)]
    read_events(responses, WARM_TOKENS)
    begin, cell, api = time.perf_counter(), thread_times(server.cell), thread_times(server.api)
    read_events(responses, tokens)
    seconds = time.perf_counter() - begin
    rest = spent(cell, thread_times(server.cell))[server.threads :]
    all_tokens = tokens * streams
    api_time = sum(spent(api, thread_times(server.api)))
    for response in responses:
        response.read()
        response.close()
    return Round(
        tuple(time / 1e3 / all_tokens for time in rest), api_time / 1e3 / all_tokens, all_tokens / seconds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", type=Path, action="append")
    o = parser.parse_args()
    print(describe(), vars(o))
    sources = o.source or [Path(__file__).parent.parent / "src"]
    rounds: dict[Path, list[Round]] = {source: [] for source in sources}
    for number in range(o.rounds):
        for source in sources:
            with serve(o.folder, source, o.threads) as server:
                rounds[source].append(measure(server, o.streams, o.tokens, number))
            print(f"  {source}: {rounds[source][-1].line()}", flush=True)
    for source, own in rounds.items():
        print(
            f"{source}: medians: engine process {median(sum(r.rest) for r in own):.1f} us, "
            f"API process {median(r.api for r in own):.1f} us, "
            f"{median(r.tokens_per_second for r in own):.1f} tokens/s"
        )


if __name__ == "__main__":
    main()
