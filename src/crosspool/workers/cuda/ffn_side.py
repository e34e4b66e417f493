"""What a weights device launches in a pass: the FFN halves, or its part of each."""

from __future__ import annotations

from torch import Tensor

from crosspool.core.spec import FfnSpec, RouterSpec
from crosspool.kernels.triton.ffn import ffn
from crosspool.kernels.triton.ffn_plan import FfnGeometry, FfnPlan, ffn_room, plan_ffn
from crosspool.kernels.triton.router import Routing
from crosspool.kernels.triton.tiles import Chip
from crosspool.models.weights import part_of_ffn
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.room import META, Room


class FfnSidePass:
    """The launches of passes of one geometry for up to ``queries`` tokens, with part ``part`` of ``parts`` of
    each FFN. ``lane`` has the words of the lane on this device."""

    def __init__(
        self, geometry: Geometry, queries: int, part: int, parts: int, chip: Chip, lane: Tensor, room: Room
    ) -> None:
        self._lane = lane
        self._plan_of: list[int] = []
        self._plans: list[FfnPlan] = []
        for layer in range(geometry.num_layers):
            own = ffn_geometry(geometry.ffn(layer), geometry.hidden, part, parts)
            plan = plan_ffn(own, queries, geometry.dtype, chip)
            if plan not in self._plans:
                self._plans.append(plan)
            self._plan_of.append(self._plans.index(plan))
        self._rooms = room.overlaid([ffn_room(plan, META) for plan in self._plans])

    def ffn(self, layer: int, normed: Tensor, out: Tensor) -> None:
        """The FFN half of a layer: normed hidden states [T, H] to its output, without the residual."""
        number = self._plan_of[layer]
        ffn(self._plans[number], self._lane, layer, normed, out, self._rooms[number])


def ffn_geometry(spec: FfnSpec, hidden: int, part: int, parts: int) -> FfnGeometry:
    """Of one device's part of an FFN. Raises ValueError if it has none."""
    own = part_of_ffn(spec, part, parts)
    if own.intermediate == 0:
        kind = "float8 FFN, which is cut at its blocks of 128 columns," if spec.float8 else "FFN"
        raise ValueError(f"part {part} of {parts} of a {kind} of {spec.intermediate} columns is empty")
    routing = None if spec.router is None else routing_of(spec.router)
    return FfnGeometry(
        hidden, own.intermediate, spec.activation, routing, own.shared_intermediate, spec.float8
    )


def routing_of(router: RouterSpec) -> Routing:
    return Routing(
        router.num_experts,
        router.top_k,
        router.scoring.value,
        router.normalise,
        router.scale,
        router.groups,
        router.top_groups,
        router.group_score.value,
        router.selection_bias,
    )
