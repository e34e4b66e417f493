"""Due times: by when each micro-batch must begin a pass, from targets and predicted costs.

What runs next follows from these times in core/pick.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from crosspool.core.batch import Grant, Half, Phase
from crosspool.core.config import SchedulerConfig
from crosspool.core.ids import GrantId, ModelIndex, Nanoseconds
from crosspool.core.spec import ModelSpec
from crosspool.costs.calibration import Calibration
from crosspool.costs.layer import HardwareProfile, LayerCosts, Work
from crosspool.scheduler.sequence import Sequence


class Times(NamedTuple):
    """The due times of a grant, as its fields of the same names, and the predicted time of one pass."""

    start_by: Nanoseconds
    interval: Nanoseconds
    layer_cost: Nanoseconds
    pass_time: Nanoseconds


class Pipeline:
    """Predicts passes and keeps the sum of what decodes in flight need, so that each leaves room for all."""

    def __init__(
        self, specs: Mapping[ModelIndex, ModelSpec], profile: HardwareProfile, config: SchedulerConfig
    ) -> None:
        self._costs = {model: LayerCosts(spec, profile) for model, spec in specs.items()}
        self._config = config
        self._calibration = Calibration()
        self._passes: dict[GrantId, int] = {}

    def chunk_fits(self, model: ModelIndex, chunks: Iterable[tuple[int, int]]) -> bool:
        """Whether a layer task of a prefill with these (start, tokens) chunks takes no longer than it may."""
        work = self._costs[model].work(chunks)
        return max(self._layer_times(model, Phase.PREFILL, work)) <= self._config.chunk_layer_cost

    def prompt_time(self, model: ModelIndex, tokens: int, start: int = 0) -> Nanoseconds:
        """Predicted time of ``tokens`` of a prompt from position ``start`` on, with the machine to itself."""
        costs = self._costs[model]
        layer = self._layer_times(model, Phase.PREFILL, costs.work([(start, tokens)]))
        return Nanoseconds(sum(layer) * costs.spec.num_layers)

    def decode_times(self, model: ModelIndex, rows: Collection[Sequence]) -> Times:
        """Of a decode grant.

        A pass is to end by its rows' last token plus the TBT target. Before that, the pass itself and one
        pass of every other decode in flight must fit.
        """
        costs = self._costs[model]
        layer = self._layer_times(model, Phase.DECODE, costs.work((row.computed, 1) for row in rows))
        own = sum(layer) * costs.spec.num_layers + costs.head(len(rows))
        passes = own + sum(self._passes.values())
        due = min(row.last_token_at + row.tbt_target for row in rows)
        interval = max(0, min(row.tbt_target for row in rows) - passes)
        return Times(
            Nanoseconds(due - passes), Nanoseconds(interval), Nanoseconds(max(layer)), Nanoseconds(own)
        )

    def prefill_times(
        self, model: ModelIndex, chunks: Collection[tuple[Sequence, int]], now: Nanoseconds
    ) -> Times:
        """Of a prefill grant. It is aged once the first of its rows would be late with its first token even
        if what is left of its prompt had the machine to itself from now on.

        One that is late already is as urgent as one whose time has just come, and no more: a long prompt that
        cannot keep its deadline does not make everybody else miss theirs.
        """
        costs = self._costs[model]
        layer = self._layer_times(
            model, Phase.PREFILL, costs.work((row.computed, tokens) for row, tokens in chunks)
        )
        own = sum(layer) * costs.spec.num_layers
        return Times(
            Nanoseconds(max(now, min(self._latest_start(row) for row, _ in chunks))),
            Nanoseconds(0),
            Nanoseconds(max(layer)),
            Nanoseconds(own),
        )

    def _latest_start(self, row: Sequence) -> int:
        return row.due - self.prompt_time(row.request.model, row.pending, row.computed)

    def submitted(self, grant: Grant, pass_time: Nanoseconds) -> None:
        if grant.phase is Phase.DECODE:
            self._passes[grant.id] = pass_time

    def retired(self, grant: Grant, layer_times: tuple[Nanoseconds, Nanoseconds]) -> None:
        """Learn from the measured mean times of the grant's (attention, FFN) layer tasks."""
        self._passes.pop(grant.id, None)
        costs = self._costs[grant.model]
        work = costs.work((row.start, len(row.tokens)) for row in grant.rows)
        for half, measured in zip(Half, layer_times, strict=True):
            predicted = costs.half(half, work)
            self._calibration.learn(grant.model, grant.phase, half, work.tokens, predicted, measured)

    def _layer_times(self, model: ModelIndex, phase: Phase, work: Work) -> tuple[int, int]:
        costs, correct = self._costs[model], self._calibration.correct
        return (
            correct(model, phase, Half.ATTENTION, work.tokens, costs.attention(work)),
            correct(model, phase, Half.FFN, work.tokens, costs.ffn(work)),
        )
