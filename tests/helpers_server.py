"""A server in processes of its own, for tests over real sockets.

Run as a script it serves what its one argument, a JSON object, describes, and prints its URL when ready.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

import helpers_fake_engine
from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.server.config import LimitsConfig, ServerConfig, SupervisionConfig
from crosspool.server.run import serve

FAKE_CELL = (sys.executable, helpers_fake_engine.__file__)


@dataclass
class RunningServer:
    """The API process and what can be asked of it."""

    process: subprocess.Popen[str]
    url: str

    def cell(self) -> psutil.Process:
        """The engine process of the moment."""
        children = psutil.Process(self.process.pid).children()
        (cell,) = [child for child in children if "--socket" in child.cmdline()]
        return cell

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/ready").status_code == 200

    def metric(self, name: str) -> float:
        """A metric without labels."""
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        return next(s.value for family in families for s in family.samples if s.name == name)

    def all_pages_free(self) -> bool:
        unheld = self.metric("crosspool_kv_pages_free") + self.metric("crosspool_kv_pages_cached")
        return unheld == self.metric("crosspool_kv_pages_total")

    def connect(self) -> socket.socket:
        address = urlsplit(self.url)
        return socket.create_connection((address.hostname, address.port), timeout=30)

    def send_request(self, path: str, body: Mapping[str, Any]) -> socket.socket:
        """A connection on which a POST request was sent and nothing read."""
        content = json.dumps(body).encode()
        connection = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        return connection


@contextmanager
def running_server(
    models: Mapping[str, Path],
    *,
    cell_command: Sequence[str] = FAKE_CELL,
    server: Mapping[str, Any] | None = None,
    pools: Mapping[str, int] | None = None,
    scheduler: Mapping[str, int] | None = None,
    url: str | None = None,
) -> Iterator[RunningServer]:
    """A server of these models, from ready to killed. With ``url`` it is not waited for."""
    description = {
        "models": {name: str(path) for name, path in models.items()},
        "cell_command": list(cell_command),
        "server": {"port": 0, **(server or {})},
        "pools": pools or {},
        "scheduler": scheduler or {},
    }
    command = [sys.executable, __file__, json.dumps(description)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = url or process.stdout.readline().strip()
        assert url, f"the server ended with status {process.wait()}"
        yield RunningServer(process, url)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def main(description: dict[str, Any]) -> int:
    options = description["server"]
    for name, kind in (("limits", LimitsConfig), ("supervision", SupervisionConfig)):
        options[name] = kind(**options.get(name, {}))
    engine = EngineConfig(
        models=tuple(ModelConfig(name, path) for name, path in description["models"].items()),
        pools=PoolConfig(**description["pools"]),
        scheduler=SchedulerConfig(**description["scheduler"]),
    )
    return serve(
        engine,
        ServerConfig(**options),
        on_ready=lambda info, url: print(url, flush=True),
        cell_command=description["cell_command"],
    )


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
