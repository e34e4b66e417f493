"""An HTTP server on the loopback address that gives prepared answers and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class CannedServer:
    """``answers`` maps a path to (status, content type, body)."""

    answers: dict[str, tuple[int, str, bytes]] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""

    def answer_json(self, path: str, content: object, status: int = 200) -> None:
        self.answers[path] = (status, "application/json", json.dumps(content).encode())

    def answer_stream(self, path: str, *events: object) -> None:
        lines = [
            event if isinstance(event, str) else json.dumps(event, ensure_ascii=False) for event in events
        ]
        body = "".join(f"data: {line}\n\n" for line in lines).encode()
        self.answers[path] = (200, "text/event-stream", body)


@contextmanager
def canned_server() -> Iterator[CannedServer]:
    canned = CannedServer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            canned.keys.append(self.headers["Authorization"])
            length = int(self.headers["Content-Length"] or 0)
            if length:
                canned.bodies.append(json.loads(self.rfile.read(length)))
            status, kind, body = canned.answers.get(self.path, (404, "text/plain", b"nothing here"))
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        canned.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield canned
        finally:
            server.shutdown()
            thread.join()
