"""Rounds of concurrent requests with random lengths and random disconnects against a real server.

Starts `crosspool serve` with the models given (default: the demo zoo), and after every round expects: no
error, every KV page free, and after the first rounds (which warm up) no growth of the server's memory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

READY_SECONDS = 300
QUIET_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def wait_until_ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes]) -> list[str]:
    """The names of the models, once they serve."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with status {server.returncode}")
        try:
            if (await client.get("/ready")).status_code == 200:
                models = (await client.get("/v1/models")).json()["data"]
                return [model["id"] for model in models]
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.2)
    raise SystemExit("the server did not become ready")


async def one_request(client: httpx.AsyncClient, rng: random.Random, models: list[str]) -> str:
    """Stream one completion, perhaps leaving in the middle. Returns what became of it."""
    prompt = [rng.randrange(100, 20_000) for _ in range(int(rng.triangular(1, 400, 20)))]
    body = {
        "model": rng.choice(models),
        "prompt": prompt,
        "max_tokens": rng.randint(1, 48),
        "temperature": rng.choice((0, 1)),
        "stream": True,
        "ignore_eos": True,
    }
    leave_after = rng.uniform(0, 20) if rng.random() < 0.3 else None
    began, finished = time.monotonic(), None
    try:
        async with asyncio.timeout(leave_after):
            async with client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    return f"status {response.status_code}"
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line[6:])
                        if "error" in event:
                            return f"error in stream: {event['error']['message']}"
                        finished = event["choices"][0]["finish_reason"] or finished
    except TimeoutError:
        return "left before it began" if time.monotonic() - began < 1 else "left"
    return f"finished: {finished}"


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            totals[sample.name] = totals.get(sample.name, 0) + sample.value
    return totals


async def wait_until_quiet(client: httpx.AsyncClient) -> dict[str, float]:
    deadline = time.monotonic() + QUIET_SECONDS
    while True:
        seen = await gauges(client)
        busy = seen["vllm:num_requests_running"] + seen["vllm:num_requests_waiting"]
        if busy == 0 or time.monotonic() > deadline:
            return seen
        await asyncio.sleep(0.2)


def resident_bytes(process: psutil.Process) -> dict[str, int]:
    """Anonymous and file-backed memory of the server and its children; weights are mapped files."""
    totals = Counter()
    for member in (process, *process.children(recursive=True)):
        memory = member.memory_info()
        totals["anonymous"] += memory.rss - memory.shared
        totals["total"] += memory.rss
    return dict(totals)


async def soak(options: argparse.Namespace, url: str, server: subprocess.Popen[bytes]) -> dict[str, object]:
    rng, process = random.Random(options.seed), psutil.Process(server.pid)
    limits = httpx.Limits(max_connections=options.concurrent)
    rounds = []
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        models = await wait_until_ready(client, server)
        for _ in range(options.rounds):
            began = time.monotonic()
            ends = Counter(
                await asyncio.gather(*(one_request(client, rng, models) for _ in range(options.concurrent)))
            )
            seen = await wait_until_quiet(client)
            rounds.append(
                {
                    "seconds": round(time.monotonic() - began, 1),
                    "ends": dict(ends),
                    "pages_unheld": seen["crosspool_kv_pages_free"] + seen["crosspool_kv_pages_cached"],
                    "pages_total": seen["crosspool_kv_pages_total"],
                    "preemptions": seen["vllm:num_preemptions_total"],
                    "resident_bytes": resident_bytes(process),
                }
            )
            print(json.dumps(rounds[-1]), flush=True)
    return {"models": models, "concurrent": options.concurrent, "rounds": rounds}


def verdict(rounds: list[dict[str, object]]) -> list[str]:
    """What went wrong, in words."""
    wrong = []
    for index, one in enumerate(rounds):
        bad = {end for end in one["ends"] if not end.startswith(("finished: length", "left"))}
        if bad:
            wrong.append(f"round {index}: {', '.join(sorted(bad))}")
        if one["pages_unheld"] != one["pages_total"]:
            wrong.append(f"round {index}: {one['pages_total'] - one['pages_free']} pages are held")
    anonymous = [one["resident_bytes"]["anonymous"] for one in rounds]
    if len(rounds) > 2 and anonymous[-1] > 1.05 * anonymous[1]:
        wrong.append(f"anonymous memory grew from {anonymous[1]:,} to {anonymous[-1]:,} bytes")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", help="folders to serve; none: the demo zoo")
    parser.add_argument("--concurrent", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-pool-bytes", default="256MiB")
    options = parser.parse_args()
    port = free_port()
    command = [str(Path(sys.executable).parent / "crosspool"), "serve", *(options.models or ["--demo"])]
    command += ["--port", str(port), "--kv-pool-bytes", options.kv_pool_bytes]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        result = asyncio.run(soak(options, f"http://127.0.0.1:{port}", server))
    finally:
        server.terminate()
        server.wait()
    wrong = verdict(result["rounds"])
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
