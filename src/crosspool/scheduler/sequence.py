"""One request on its way through the scheduler."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

from crosspool.core.errors import InvariantError
from crosspool.core.ids import CopyId, GrantId, Nanoseconds
from crosspool.core.request import FinishReason, Request
from crosspool.pools.page_table import PageTable
from crosspool.pools.spill import SpilledPages


class State(StrEnum):
    """Where a sequence is. Only a WAITING or FINISHED sequence holds no page table."""

    WAITING = "waiting"
    """Holds no page; in its model's line."""
    PREFILLING = "prefilling"
    """Its known tokens are being computed, chunk by chunk."""
    DECODING = "decoding"
    """All but its newest token are computed."""
    SPILLING = "spilling"
    """It is preempted; what it has computed is being copied to host memory."""
    RETURNING = "returning"
    """What it had computed is being copied back into pages."""
    DRAINING = "draining"
    """It has ended, but a micro-batch in flight, or a copy, still uses its pages."""
    FINISHED = "finished"


class Wait(StrEnum):
    """Why a sequence makes no progress for want of pages."""

    QUEUED = "queued"
    """It has not been admitted yet."""
    PREEMPTED = "preempted"
    """Another has taken its pages; it is in its line again."""
    STALLED = "stalled"
    """It holds pages, and needs more than there are."""


TRANSITIONS = frozenset(
    {
        (State.WAITING, State.PREFILLING),
        (State.WAITING, State.RETURNING),
        (State.WAITING, State.FINISHED),
        (State.PREFILLING, State.DECODING),
        (State.PREFILLING, State.WAITING),
        (State.PREFILLING, State.SPILLING),
        (State.PREFILLING, State.DRAINING),
        (State.PREFILLING, State.FINISHED),
        (State.DECODING, State.WAITING),
        (State.DECODING, State.SPILLING),
        (State.DECODING, State.DRAINING),
        (State.DECODING, State.FINISHED),
        (State.SPILLING, State.WAITING),
        (State.SPILLING, State.DRAINING),
        (State.RETURNING, State.PREFILLING),
        (State.RETURNING, State.DECODING),
        (State.RETURNING, State.DRAINING),
        (State.DRAINING, State.FINISHED),
    }
)
"""Every move there is. PREFILLING or DECODING to WAITING or SPILLING is preemption."""


@dataclass(slots=True, eq=False)
class Sequence:
    """What is stored is little; lengths are derived.

    ``due`` (arrival, TTFT target and the time that the prompt itself takes) orders admission, prefill and
    preemption for the sequence's whole life: short prompts pass long ones that came a little earlier, and
    the earliest is never preempted, so somebody always comes through. ``computed`` is the number of positions
    whose KV is in pages, ``cached_tokens`` how many of the prompt others had computed. ``chunk_keys`` are the
    keys of the prefix cache made so far, before the first chunk and after each. ``spilled`` is what it has in
    host memory, ``copy`` the copy in flight of its pages.
    """

    request: Request
    due: Nanoseconds
    tbt_target: Nanoseconds
    moves: Counter[tuple[State, State]]
    output: list[int] = field(default_factory=list)
    computed: int = 0
    cached_tokens: int = 0
    chunk_keys: list[bytes] = field(default_factory=list)
    state: State = State.WAITING
    table: PageTable | None = None
    spilled: SpilledPages | None = None
    grant: GrantId | None = None
    copy: CopyId | None = None
    admitted_at: Nanoseconds = Nanoseconds(0)
    last_token_at: Nanoseconds = Nanoseconds(0)
    preemptions: int = 0
    finish: FinishReason | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Deadline order, total because ids differ."""
        return (self.due, self.request.id)

    @property
    def known(self) -> int:
        """Number of tokens that exist: prompt and output."""
        return len(self.request.prompt_token_ids) + len(self.output)

    @property
    def pending(self) -> int:
        """Known tokens whose KV is not computed yet."""
        return self.known - self.computed

    @property
    def remaining(self) -> int:
        """Tokens it may still make."""
        return self.request.max_tokens - len(self.output)

    @property
    def idle(self) -> bool:
        """No micro-batch in flight has a row of it, and none of its pages is being copied."""
        return self.grant is None and self.copy is None

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens at positions start..stop-1."""
        prompt = self.request.prompt_token_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        output = self.output[max(0, start - len(prompt)) : stop - len(prompt)]
        return prompt[start:] + tuple(output)

    def move(self, to: State) -> None:
        """Raises InvariantError for a move that is not in TRANSITIONS."""
        if (self.state, to) not in TRANSITIONS:
            raise InvariantError(f"request {self.request.id} cannot move from {self.state} to {to}")
        self.moves[self.state, to] += 1
        self.state = to
