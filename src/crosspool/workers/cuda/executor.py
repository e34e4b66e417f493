"""core.protocols.Executor over devices with streams.

The engine's thread lays grants out and reads events. One more thread feeds the devices, with grants
(feeder.py) and copies of pages (copies.py). Tokens, stop checks and next inputs need neither: see
kernels/triton/pass_end.py.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress

from crosspool.backends.device import Device
from crosspool.core.batch import Event, Grant
from crosspool.core.copies import PageCopy
from crosspool.core.errors import DeviceError, InvariantError
from crosspool.core.ids import GrantId, RequestId
from crosspool.workers.cuda.copies import PageCopier
from crosspool.workers.cuda.feeder import Feeder

_log = logging.getLogger(__name__)

PAUSE = 20e-6
"""Seconds between two looks at what has run."""


class CudaExecutor:
    """``feeder`` and ``copier`` have everything that serving needs: on the ``devices`` nothing is allocated
    from now on."""

    def __init__(
        self, feeder: Feeder, copier: PageCopier, devices: Sequence[Device], *, pause: float = PAUSE
    ) -> None:
        self._feeder = feeder
        self._copier = copier
        self._devices = devices
        self._pause = pause
        self._lock = threading.Lock()
        self._news, self._work = threading.Condition(self._lock), threading.Condition(self._lock)
        self._broken: Exception | None = None
        self._woken = self._closed = False
        for device in devices:
            device.seal()
        self._thread = threading.Thread(target=self._run, name="crosspool devices", daemon=True)
        self._thread.start()

    def submit(self, grant: Grant) -> None:
        """Raises InvariantError for a grant larger than the lanes, or one that cannot run where it is to."""
        with self._lock:
            if self._closed:
                raise InvariantError(f"grant {grant.id} was submitted to an executor that is closed")
            self._feeder.submit(grant)
            self._work.notify()

    def cancel(self, request: RequestId) -> None:
        with self._lock:
            self._feeder.cancel(request)
            self._copier.cancel(request)
            self._work.notify()

    def copy(self, copy: PageCopy) -> None:
        """Raises InvariantError for one that the spill store has no such pages for."""
        with self._lock:
            if self._closed:
                raise InvariantError(f"copy {copy.id} was submitted to an executor that is closed")
            self._copier.copy(copy)
            self._work.notify()

    def recall(self, grant: GrantId) -> None:
        with self._lock:
            self._feeder.recall(grant)
            self._work.notify()

    def stream_to(self, pipe: int) -> None:
        with self._lock:
            self._feeder.pipe.to = pipe

    def poll(self) -> list[Event]:
        """Raises InvariantError if nothing can be relied on any more; what ended before that comes first."""
        with self._lock:
            events = [*self._feeder.take_events(), *self._copier.take()]
            if self._broken is not None and not events:
                raise InvariantError("the devices are no longer fed") from self._broken
            return events

    def wait(self, timeout: float) -> None:
        with self._lock:
            self._news.wait_for(self._has_news, timeout)
            self._woken = False

    def wake(self) -> None:
        with self._lock:
            self._woken = True
            self._news.notify_all()

    def close(self) -> None:
        """Raises InvariantError if something was allocated on a device while it served. Afterwards nothing
        runs that writes into memory which is then somebody else's, on devices that still answer."""
        with self._lock:
            self._closed = True
            self._work.notify()
            self._news.notify_all()
        self._thread.join()
        for device in self._devices:
            with suppress(DeviceError) if self._broken is not None else nullcontext():
                device.finish()
        if self._broken is None:
            for device in self._devices:
                device.check_sealed()

    def _has_news(self) -> bool:
        told = self._feeder.told or self._copier.told
        return told or self._woken or self._closed or self._broken is not None

    def _run(self) -> None:
        try:
            while self._await_work():
                with self._lock:
                    busy = self._feeder.step()
                    busy |= self._copier.step()
                    if self._feeder.broken is not None:
                        raise self._feeder.broken
                    if self._feeder.told or self._copier.told:
                        self._news.notify_all()
                    if not busy:
                        self._work.wait(self._pause)
        except Exception as error:
            _log.exception("the thread that feeds the devices died")
            with self._lock:
                self._broken = error
                self._news.notify_all()

    def _await_work(self) -> bool:
        """Block while nothing is in flight. False once the executor is closed."""
        with self._lock:
            self._work.wait_for(lambda: self._closed or not (self._feeder.idle and self._copier.idle))
            return not self._closed
