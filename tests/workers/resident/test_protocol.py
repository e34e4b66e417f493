"""The compiled steps of the protocol: micro-batches go back and forth between real threads."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.intrinsics import load_acquire, words
from crosspool.workers.resident import control as layout
from crosspool.workers.resident.control import BELL, BODY, RING_EVENTS, SLOT_WORDS, STAGE_BITS, STOP, Control
from crosspool.workers.resident.protocol import (
    await_bell,
    await_news,
    hand_over,
    position_of,
    read_word,
    retire,
    ring_bell,
    ring_news,
    send_event,
    submit,
    write_word,
)

pytestmark = pytest.mark.backend

SLOTS_USED = 3
STAGES = 11
SECOND = 1_000_000_000


@kernel
def team_loop(control, slots, own, other, ring, parity):
    """Run the stages of this parity of whatever is in the slots, and count in the body what was run. The last
    stage announces the body's count. Returns when told to stop; always sleeps when it has nothing to do."""
    while load_acquire(control + 8 * STOP) == 0:
        heard = load_acquire(own + 8 * BELL)
        worked = False
        for index in range(SLOTS_USED):
            slot = slots + 8 * SLOT_WORDS * index
            position = position_of(slot)
            stage = position & ((1 << STAGE_BITS) - 1)
            if position < 0 or stage % 2 != parity:
                continue
            worked = True
            body = words(words(slot, SLOT_WORDS)[BODY], 1)
            body[0] += stage
            if stage + 1 < STAGES:
                hand_over(slot, stage + 1)
                ring_bell(other)
            else:
                send_event(control, own, ring, 2, -1, body[0], index, 0, position >> STAGE_BITS)
                retire(slot)
                ring_news(control)
        if not worked:
            await_bell(own, heard, SECOND)


class Engine:
    """The engine's side: fills slots, fetches events."""

    def __init__(self) -> None:
        self.control = Control.allocate(2)
        self.bodies = np.zeros(SLOTS_USED, np.int64)
        self.teams = [self.control.teams + 8 * layout.TEAM_WORDS * i for i in range(2)]
        self.threads = [
            threading.Thread(
                target=team_loop,
                args=(
                    self.control.address,
                    self.control.slots,
                    self.teams[parity],
                    self.teams[1 - parity],
                    self.control.rings + 8 * parity * RING_EVENTS * layout.EVENT_WORDS,
                    parity,
                ),
            )
            for parity in range(2)
        ]
        for thread in self.threads:
            thread.start()

    def slot(self, index: int) -> int:
        return self.control.slots + 8 * SLOT_WORDS * index

    def put(self, index: int, sequence: int) -> None:
        self.bodies[index] = sequence * 1000
        self.control.slot_words(index)[BODY] = self.bodies.ctypes.data + 8 * index
        submit(self.slot(index), sequence, self.teams[0])

    def is_free(self, index: int, last: int) -> bool:
        return bool(read_word(self.slot(index) + 8 * layout.RETIRED) == last)

    def fetch(self) -> list[tuple[int, int, int]]:
        """(slot, count, sequence) of the micro-batches that have ended."""
        events, ring = [], self.control.ring(0)
        read = int(self.control.team_words(0)[layout.EVENTS_READ])
        while read < read_word(self.teams[0] + 8 * layout.EVENTS_WRITTEN):
            _, _, count, slot, _, sequence, *_ = ring[read % RING_EVENTS].tolist()
            events.append((slot, count, sequence))
            read += 1
        write_word(self.teams[0] + 8 * layout.EVENTS_READ, read)
        return events

    def close(self) -> None:
        write_word(self.control.address + 8 * STOP, 1)
        for team in self.teams:
            ring_bell(team)
        for thread in self.threads:
            thread.join()


def test_micro_batches_cross_between_teams_and_their_slots_come_back() -> None:
    """More events than a ring holds, so that it goes round."""
    engine = Engine()
    try:
        total, submitted, done = RING_EVENTS + 500, 0, 0
        last = [0] * SLOTS_USED
        seen = 0
        while done < total:
            for index in range(SLOTS_USED):
                if submitted < total and engine.is_free(index, last[index]):
                    submitted += 1
                    last[index] = submitted
                    engine.put(index, submitted)
            for slot, count, sequence in engine.fetch():
                assert count == sequence * 1000 + STAGES * (STAGES - 1) // 2
                assert last[slot] >= sequence
                done += 1
            if done < total:
                seen = await_news(engine.control.address, seen, SECOND)
    finally:
        engine.close()
    assert not any(thread.is_alive() for thread in engine.threads)
