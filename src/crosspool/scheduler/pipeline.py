"""Due times: by when each micro-batch must begin a pass, from targets and predicted costs.

What runs next follows from these times in core/pick.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from crosspool.core.batch import Grant, Half, Phase
from crosspool.core.config import SchedulerConfig
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds
from crosspool.core.spec import ModelSpec
from crosspool.costs.calibration import Calibration
from crosspool.costs.layer import HardwareProfile, LayerCosts, Work
from crosspool.scheduler.sequence import Sequence


class Times(NamedTuple):
    """The due times of a grant, as its fields of the same names."""

    start_by: Nanoseconds
    interval: Nanoseconds
    layer_cost: Nanoseconds


class Pipeline:
    """Predicts passes and keeps the sum of what decodes in flight need, so that each leaves room for all."""

    def __init__(
        self, specs: Mapping[ModelIndex, ModelSpec], profile: HardwareProfile, config: SchedulerConfig
    ) -> None:
        self._specs = dict(specs)
        self._costs = {model: LayerCosts(spec, profile) for model, spec in specs.items()}
        self._config = config
        self._calibration = Calibration()
        self._passes: dict[GrantId, int] = {}
        self._chunk_tokens: dict[ModelIndex, int] = {}

    def chunk_tokens(self, model: ModelIndex) -> int:
        """Tokens of a prompt chunk: as many quanta as a layer task's time allows, one at least."""
        known = self._chunk_tokens.get(model)
        if known is None:
            known = self._chunk_tokens[model] = self._find_chunk_tokens(model)
        return known

    def decode_times(self, model: ModelIndex, rows: Collection[Sequence]) -> Times:
        """Of a decode grant.

        A pass is to end by its rows' last token plus the TBT target. Before that, the pass itself and one
        pass of every other decode in flight must fit.
        """
        layer = self._layer_times(model, Phase.DECODE, Work.of((row.computed, 1) for row in rows))
        passes = self._pass_time(model, layer) + sum(self._passes.values())
        due = min(row.last_token_at + row.tbt_target for row in rows)
        interval = max(0, min(row.tbt_target for row in rows) - passes)
        return Times(Nanoseconds(due - passes), Nanoseconds(interval), Nanoseconds(max(layer)))

    def prefill_times(self, model: ModelIndex, chunks: Collection[tuple[Sequence, int]]) -> Times:
        """Of a prefill grant: it is aged once the first of its rows is due to have its first token."""
        work = Work.of((row.computed, tokens) for row, tokens in chunks)
        layer = self._layer_times(model, Phase.PREFILL, work)
        return Times(min(row.due for row, _ in chunks), Nanoseconds(0), Nanoseconds(max(layer)))

    def submitted(self, grant: Grant) -> None:
        if grant.phase is Phase.DECODE:
            self._passes[grant.id] = grant.layer_cost * 2 * self._specs[grant.model].num_layers

    def retired(self, grant: Grant, layer_times: tuple[Nanoseconds, Nanoseconds]) -> None:
        """Learn from the measured mean times of the grant's (attention, FFN) layer tasks."""
        self._passes.pop(grant.id, None)
        work = Work.of((row.start, len(row.tokens)) for row in grant.rows)
        costs = self._costs[grant.model]
        for half, measured in zip(Half, layer_times, strict=True):
            predicted = costs.half(half, work)
            self._calibration.learn(grant.model, grant.phase, half, predicted, measured)
        if grant.phase is Phase.PREFILL:
            self._chunk_tokens.pop(grant.model, None)

    def _layer_times(self, model: ModelIndex, phase: Phase, work: Work) -> tuple[int, int]:
        costs, correct = self._costs[model], self._calibration.correct
        return (
            correct(model, phase, Half.ATTENTION, costs.attention(work)),
            correct(model, phase, Half.FFN, costs.ffn(work)),
        )

    def _pass_time(self, model: ModelIndex, layer: tuple[int, int]) -> int:
        return sum(layer) * self._specs[model].num_layers

    def _find_chunk_tokens(self, model: ModelIndex) -> int:
        quantum = self._config.chunk_quantum
        tokens = quantum
        while tokens + quantum <= self._config.max_chunk_tokens:
            larger = tokens + quantum
            cost = max(self._layer_times(model, Phase.PREFILL, Work.of([(0, larger)])))
            if cost > self._config.chunk_layer_cost:
                break
            tokens = larger
        return tokens
