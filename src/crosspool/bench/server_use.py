"""What a server's processes take of this machine while it is measured: memory and processor time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import psutil

from crosspool.core.errors import ConfigError

SAMPLE_SECONDS = 0.5
PSS_SHARE = 0.01
"""Of the time that reading PSS may take: the kernel walks all page tables for it, 20 ms a GiB, and the server
may have to wait meanwhile."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Memory of all processes together; ``peak`` is the most that was seen. RSS is read twice a second, PSS
    less often if it is large. None: not known, as the server had ended or its processes may not be read."""

    begin: int | None
    peak: int | None
    end: int | None


@dataclass(frozen=True, slots=True)
class ServerUse:
    """``rss``: resident memory, where a shared page counts in every process that maps it; in ``pss`` it
    counts in each for its part. ``cpu_seconds``: of all threads; None if the server ended."""

    pid: int
    rss: Bytes
    pss: Bytes
    cpu_seconds: float | None


class ServerWatch:
    """Watches a process and its descendants from entering to leaving. Raises ConfigError if there is none."""

    def __init__(self, pid: int) -> None:
        try:
            self._root = psutil.Process(pid)
        except (psutil.NoSuchProcess, ValueError) as error:
            raise ConfigError(f"there is no process {pid}") from error
        self._rss: list[int | None] = []
        self._pss: list[int | None] = []
        self._cpu: list[float | None] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)

    def __enter__(self) -> ServerWatch:
        self._sample()
        self._cpu.append(self._cpu_seconds())
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._cpu.append(self._cpu_seconds())
        self._sample()

    def use(self) -> ServerUse:
        """What was seen. Call it after leaving."""
        begin, end = self._cpu
        cpu = None if begin is None or end is None else end - begin
        return ServerUse(self._root.pid, _bytes(self._rss), _bytes(self._pss), cpu)

    def _sample_until_stopped(self) -> None:
        """PSS as seldom as its cost demands, RSS always: that one costs next to nothing."""
        next_pss = time.monotonic()
        while not self._stop.wait(SAMPLE_SECONDS):
            self._rss.append(self._sum(_rss))
            begin = time.monotonic()
            if begin >= next_pss:
                self._pss.append(self._sum(_pss))
                end = time.monotonic()
                next_pss = end + (end - begin) / PSS_SHARE

    def _sample(self) -> None:
        self._rss.append(self._sum(_rss))
        self._pss.append(self._sum(_pss))

    def _sum(self, read: Callable[[psutil.Process], int]) -> int | None:
        """Over all processes that live. None if none does, or if one may not be read."""
        total = 0
        for process in self._processes():
            try:
                total += read(process)
            except psutil.NoSuchProcess:
                continue
            except psutil.AccessDenied:
                return None
        return total or None

    def _processes(self) -> Iterator[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            yield from (self._root, *self._root.children(recursive=True))

    def _cpu_seconds(self) -> float | None:
        """Of the processes that live, and of those that ended and that one of them waited for."""
        seconds = []
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                seconds.append(sum(process.cpu_times()[:4]))
        return sum(seconds) if seconds else None


def _rss(process: psutil.Process) -> int:
    return int(process.memory_info().rss)


def _pss(process: psutil.Process) -> int:
    return int(process.memory_full_info().pss)


def _bytes(sizes: list[int | None]) -> Bytes:
    return Bytes(sizes[0], max((size for size in sizes if size is not None), default=None), sizes[-1])
