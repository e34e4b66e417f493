"""A server as a process group: started, watched until it is healthy, paused, weighed, and always ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx
import psutil

from peers.places import LOGS, PeerError

STOP_SECONDS = 15


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """One server and all its children. Use it with ``with``: leaving ends them, whatever happened.

    ``command`` has to listen on ``port`` of this machine; ``health`` answers 200 once it serves.
    """

    def __init__(
        self, name: str, command: Sequence[object], port: int, health: str, environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.command = [str(word) for word in command]
        self._health = self.url + health
        LOGS.mkdir(parents=True, exist_ok=True)
        self._log = LOGS / f"{name}.log"
        self.started = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait_until_ready(self, seconds: float) -> None:
        """Raises PeerError if the server ends or is not healthy within so many seconds of its start."""
        with httpx.Client(timeout=5) as client:
            while time.perf_counter() - self.started < seconds:
                if self._process.poll() is not None:
                    raise PeerError(
                        f"{self.name} ended with status {self._process.returncode}; see {self._log}"
                    )
                with contextlib.suppress(httpx.TransportError):
                    if client.get(self._health).status_code == 200:
                        return
                time.sleep(0.02)
        raise PeerError(f"{self.name} was not ready after {seconds:.0f} s; see {self._log}")

    def members(self) -> list[psutil.Process]:
        """The processes of the server that live."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        return []

    def pause(self) -> None:
        """Stop all its threads where they are, so that a server that spins when idle disturbs nobody."""
        _signal(self.members(), signal.SIGSTOP)

    def resume(self) -> None:
        _signal(self.members(), signal.SIGCONT)

    def stop(self) -> None:
        """Ask all processes to end, and end by force those that have not after STOP_SECONDS."""
        members = self.members()
        _signal(members, signal.SIGCONT)
        if members:
            _signal(members[:1], signal.SIGTERM)
        _, alive = psutil.wait_procs(members, timeout=STOP_SECONDS)
        _signal(alive, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def proportional_bytes(processes: Iterable[psutil.Process]) -> int:
    """Memory of the processes, where what several map counts for each in part (PSS of proc_pid_smaps(5))."""
    return _sum_of(processes, "smaps_rollup", "Pss:")


def peak_bytes(processes: Iterable[psutil.Process]) -> int:
    """Sum of the largest resident sizes so far (VmHWM of proc_pid_status(5)). Shared pages count in each."""
    return _sum_of(processes, "status", "VmHWM:")


def _sum_of(processes: Iterable[psutil.Process], file: str, field: str) -> int:
    total = 0
    for process in processes:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for line in Path(f"/proc/{process.pid}/{file}").read_text().splitlines():
                if line.startswith(field):
                    total += 1024 * int(line.split()[1])
    return total


def _signal(processes: Iterable[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
