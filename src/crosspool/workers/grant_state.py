"""What the workers know of one grant while it is in flight."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from crosspool.core.batch import Grant, Half, Row, TokenEvent, row_after
from crosspool.core.ids import GrantId, Nanoseconds, RequestId
from crosspool.core.request import TokenLogprobs
from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.reference.sampling import Choice, Chosen, TokenHistory
from crosspool.workers.channel import HiddenStateChannel


class ActiveRow:
    """One row on its way through the passes of a grant.

    ``inputs`` are the next pass's, at positions from ``start`` on; ``page_tables`` int64 [chunks] per group.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.page_tables = tuple(torch.tensor(pages, dtype=torch.int64) for pages in row.pages)
        self.start = row.start
        self.inputs: Sequence[int] = row.tokens
        self._made = 0
        choice = row.choice
        penalised = choice is not None and choice.params.penalised
        self._history = TokenHistory(choice.prompt, choice.output) if choice and penalised else None

    @property
    def request(self) -> RequestId:
        return self.row.request

    @property
    def chooses(self) -> bool:
        """Whether the head chooses a token for this row (not for a prompt chunk that is not the last)."""
        return self.row.choice is not None

    def choice(self) -> Choice:
        """How the next token is chosen. Stop tokens are suppressed until ``min_tokens`` outputs exist."""
        choice = self.row.choice
        assert choice is not None
        params, index = choice.params, choice.output_index + self._made
        return Choice(
            seed=choice.seed,
            index=index,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            suppressed=tuple(choice.stop_token_ids) if index < params.min_tokens else (),
            history=self._history,
            logprobs=params.logprobs,
        )

    def take(self, chosen: Chosen, grant: GrantId) -> tuple[TokenEvent, bool]:
        """The token chosen becomes the next pass's input. Returns its event and whether the row ends."""
        self.start += len(self.inputs)
        self.inputs = (chosen.token,)
        self._made += 1
        if self._history is not None:
            self._history.append(chosen.token)
        finish, ended = row_after(self.row, self._made, chosen.token)
        assert self.row.choice is not None
        wanted = self.row.choice.params.logprobs is not None
        logprobs = TokenLogprobs(chosen.logprob, chosen.rank, chosen.top) if wanted else None
        return TokenEvent(grant, self.request, chosen.token, finish, logprobs), ended


@dataclass(slots=True)
class LayerTimes:
    """Mean span of one half's layer tasks."""

    total: int = 0
    count: int = 0

    def add(self, span: int) -> None:
        self.total += span
        self.count += 1

    @property
    def mean(self) -> Nanoseconds:
        return Nanoseconds(self.total // self.count if self.count else 0)


@dataclass(slots=True)
class GrantState:
    """One grant in flight. ``alive`` is the set that core/in_flight.py keeps: only requests leave it.

    ``rows``, ``batch`` and ``hidden`` (the residual stream [T, H]) are of the current pass and belong to the
    attention side.
    """

    grant: Grant
    alive: Collection[RequestId]
    channel: HiddenStateChannel = field(default_factory=HiddenStateChannel)
    rows: list[ActiveRow] | None = None
    batch: AttentionBatch | None = None
    hidden: Tensor | None = None
    times: dict[Half, LayerTimes] = field(default_factory=lambda: {half: LayerTimes() for half in Half})
    error: str | None = None
