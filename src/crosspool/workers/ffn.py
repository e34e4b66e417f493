"""The FFN side: a weight table, and the worker of one weights device that computes from its rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crosspool.core.ids import ModelIndex
from crosspool.core.spec import FfnSpec
from crosspool.models.moe_decoder import FfnWeights, ffn


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One layer's FFN as one weights device holds it: its geometry, and all or a share of its weights."""

    spec: FfnSpec
    weights: FfnWeights


class WeightTable:
    """The FFN weights on one weights device, by (model, layer). Rows are replaced whole, never changed."""

    def __init__(self) -> None:
        self._rows: dict[tuple[ModelIndex, int], WeightRow] = {}

    def put(self, model: ModelIndex, layer: int, row: WeightRow) -> None:
        self._rows[model, layer] = row

    def remove(self, model: ModelIndex) -> None:
        """Forget all rows of a model, if there are any."""
        for key in [key for key in self._rows if key[0] == model]:
            del self._rows[key]

    def row(self, model: ModelIndex, layer: int) -> WeightRow:
        return self._rows[model, layer]


class FfnWorker:
    """Computes FFN halves from the weight table of one weights device."""

    def __init__(self, table: WeightTable) -> None:
        self._table = table

    def ffn(self, model: ModelIndex, layer: int, hidden: Tensor) -> Tensor:
        """This device's part [T, H] of the layer's FFN output; the parts of all devices sum to the whole."""
        row = self._table.row(model, layer)
        return ffn(row.spec, row.weights, hidden)
