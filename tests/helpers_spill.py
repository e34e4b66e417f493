"""Engines whose sequences are spilled, and what they say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from crosspool.core.copies import Direction, PageCopy
from crosspool.core.ids import RequestId
from crosspool.core.request import FinishReason, Request
from crosspool.engine.engine import Engine


def spill_always(engine: Engine) -> None:
    """Copies are said to cost nothing: with a store, what is preempted is spilled."""
    engine._scheduler.spilling._costs.time = lambda direction, size: 0  # type: ignore[method-assign]


class Told:
    """What an engine says of its requests, and which copies it makes."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        self.outputs: dict[RequestId, list[object]] = {own.id: [] for own in requests}
        self.finished: dict[RequestId, FinishReason] = {}
        self.copies: list[PageCopy] = []
        copy = engine._executor.copy
        engine._executor.copy = lambda each: (self.copies.append(each), copy(each))[0]
        for own in requests:
            engine.add(own)

    def steps(self) -> Iterator[None]:
        while self.engine.has_work():
            self.engine.wait(10.0)
            for output in self.engine.step():
                self.outputs[output.request] += zip(output.token_ids, output.logprobs, strict=True)
                if output.finish_reason is not None:
                    self.finished[output.request] = output.finish_reason
            self.engine.check()
            yield

    def run(self) -> dict[RequestId, list[object]]:
        for _ in self.steps():
            pass
        stats = self.engine.stats()
        assert stats.kv_pages_held == 0 and stats.spill_used_bytes == 0
        return self.outputs

    def copied(self, direction: Direction) -> list[PageCopy]:
        return [copy for copy in self.copies if copy.direction is direction]
