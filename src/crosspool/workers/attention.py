"""The attention side of one KV device: embedding, attention halves, head and token choice."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

from crosspool.core.batch import TokenEvent
from crosspool.core.ids import ModelIndex
from crosspool.kernels.reference.sampling import choose_tokens
from crosspool.models.moe_decoder import AttentionSide
from crosspool.workers.grant_state import ActiveRow, GrantState


class AttentionWorker:
    """Runs the attention side of every model where the KV is.

    ``arena`` is uint8 [num_pages, page_bytes]: the pages of all KV devices, shared by all models.
    """

    def __init__(self, sides: Mapping[ModelIndex, AttentionSide], arena: Tensor) -> None:
        self._sides = sides
        self._arena = arena

    def attention(self, state: GrantState, layer: int) -> None:
        """The attention half of a layer; layer 0 begins a pass with the rows that are still alive."""
        side = self._sides[state.grant.model]
        if layer > 0:
            self._add_ffn_output(state)
        elif not self._begin_pass(state, side):
            return
        assert state.hidden is not None and state.batch is not None
        state.hidden, ffn_input = side.attention(layer, state.hidden, state.batch, self._arena)
        state.channel.send_input(ffn_input)

    def head(self, state: GrantState) -> list[tuple[TokenEvent, bool]]:
        """The end of a pass: a token for each of its rows that chooses, and whether it was the row's last."""
        self._add_ffn_output(state)
        assert state.hidden is not None and state.batch is not None and state.rows is not None
        ends = state.batch.query_starts[1:]
        last = [(row, end - 1) for row, end in zip(state.rows, ends, strict=True) if row.chooses]
        if not last:
            return []
        logits = self._sides[state.grant.model].logits(state.hidden[[query for _, query in last]])
        chosen = choose_tokens(logits, [row.choice() for row, _ in last])
        return [row.take(token, state.grant.id) for (row, _), token in zip(last, chosen, strict=True)]

    def _begin_pass(self, state: GrantState, side: AttentionSide) -> bool:
        """Embed the inputs of the rows that are alive. Returns whether there are any."""
        rows = [ActiveRow(row) for row in state.grant.rows] if state.rows is None else state.rows
        state.rows = rows = [row for row in rows if row.request in state.alive]
        if not rows:
            return False
        state.batch = side.batch(
            [row.start for row in rows],
            [len(row.inputs) for row in rows],
            [row.page_tables for row in rows],
        )
        state.hidden = side.embed(torch.tensor(list(chain.from_iterable(row.inputs for row in rows))))
        return True

    def _add_ffn_output(self, state: GrantState) -> None:
        assert state.hidden is not None
        state.hidden = state.hidden + state.channel.receive_output()
