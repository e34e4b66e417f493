"""What the control plane asks of the machine: a clock, and somebody who executes grants."""

from __future__ import annotations

from typing import Protocol

from crosspool.core.batch import Event, Grant
from crosspool.core.copies import PageCopy
from crosspool.core.ids import GrantId, Nanoseconds, RequestId


class Clock(Protocol):
    """Monotonic time. The engine never asks the operating system."""

    def now(self) -> Nanoseconds: ...


class Executor(Protocol):
    """Runs micro-batches layer by layer in the order of core/pick.py.

    The real executor, the simulator's and the tests' all keep this contract: events of one grant come in
    order, exactly one RetiredEvent ends it, and pages of a grant are not touched after it. Likewise one
    CopiedEvent ends each copy.
    """

    def submit(self, grant: Grant) -> None:
        """Take a grant. Never blocks; the number in flight is bounded by the scheduler."""
        ...

    def copy(self, copy: PageCopy) -> None:
        """Copy pages to host memory or back. Never blocks, and lets others' micro-batches go on meanwhile:
        it is done in bounded pieces, at any time until its CopiedEvent."""
        ...

    def cancel(self, request: RequestId) -> None:
        """Ask that a request's rows stop at the next layer or step boundary. Its grant still retires. A copy
        of its pages may be dropped half-way, and still has its CopiedEvent."""
        ...

    def recall(self, grant: GrantId) -> None:
        """Ask that a grant retires at its next step boundary, with the tokens made until then. It may be over
        already."""
        ...

    def stream_to(self, pipe: int) -> None:
        """Allow tokens to be written into a pipe (core/token_record.py) as they are made, from any thread.
        That does not end a ``wait``; their events come later, as delivered. Call it before any ``submit``.

        Those of one request keep their order if what ``poll`` returned has been passed on before its next
        grant is submitted. A token with a reason to finish or with log-probabilities is only an event.
        """
        ...

    def poll(self) -> list[Event]:
        """Events since the last call, oldest first. Never blocks."""
        ...

    def wait(self, timeout: float) -> None:
        """Block until an event may be there, ``wake`` is called, or ``timeout`` seconds have passed."""
        ...

    def wake(self) -> None:
        """End a ``wait`` from another thread."""
        ...

    def close(self) -> None:
        """Stop the workers. Grants in flight are dropped."""
        ...
