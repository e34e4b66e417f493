"""The resident FFN kernel, each of its programs in a process of its own, against the launches of ffn.py:
equal to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from crosspool.kernels.triton import words
from crosspool.kernels.triton.ffn import ffn
from crosspool.kernels.triton.ffn_plan import FfnGeometry, FfnPlan, FfnRoom, ffn_room, plan_ffn
from crosspool.kernels.triton.ffn_queue import LOST, ask
from crosspool.kernels.triton.resident_ffn import MOST_ROWS, resident_room, serve
from crosspool.kernels.triton.router import Routing
from helpers_triton_ffn import CHIP, GEOMETRIES, IN_PARTS, Layer, layer_of
from helpers_triton_gates import needs_interpreter
from helpers_triton_programs import Crew, shared, shared_queue
from helpers_triton_tables import Lane

pytestmark = [pytest.mark.backend, needs_interpreter]

CPU = torch.device("cpu")


def filled(room: FfnRoom) -> FfnRoom:
    """With anything."""
    for tensor in (*room, room.router.parts):
        if isinstance(tensor, Tensor):
            tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)
    return room


def rows_of(plan: FfnPlan, rows: int, seed: int) -> Tensor:
    """[capacity, H], of which ``rows`` are numbers."""
    x = torch.full((plan.capacity, plan.geometry.hidden), float("nan"), dtype=plan.dtype)
    x[:rows] = torch.randn(rows, x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    return x


def compute(
    plan: FfnPlan, asked: Sequence[tuple[Sequence[Layer], int, int]], programs: int, patience: int = 20
) -> None:
    """All that is ``asked``, so many rows of a layer of a model each, by lanes beside each other, is what
    ffn.py computes; rows that nobody asks for are left alone."""
    queue = shared_queue(2, programs, patience=patience)
    room: FfnRoom = shared(filled(resident_room(plan, programs, CPU)))
    askers: list[Callable[[], None]] = []
    results: list[tuple[Tensor, Tensor]] = []
    lanes = [Lane([layer.words for layer in model], {words.QUERIES: rows}) for model, _, rows in asked]
    for number, ((_, layer, rows), lane) in enumerate(zip(asked, lanes, strict=True)):
        x = rows_of(plan, rows, number)
        out, wanted = shared(torch.full_like(x, 7.0)), torch.full_like(x, 7.0)
        ffn(plan, lane.words, layer, x, wanted, ffn_room(plan, CPU))
        assert wanted[:rows].isfinite().all() and wanted[rows:].eq(7).all()
        askers.append(partial(ask, queue, lane.words, layer, x, out))
        results.append((out, wanted))
    Crew(queue, lambda launch: serve(plan, queue, room, launch)).run(askers)
    assert not int(queue.news[LOST])
    for number, (out, wanted) in enumerate(results):
        assert torch.equal(out, wanted), f"{asked[number][2]} rows of layer {asked[number][1]}"


CASES = GEOMETRIES | {f"{name}, in parts": one for name, one in IN_PARTS.items() if name != "dense"}


@pytest.mark.parametrize("geometry", CASES.values(), ids=CASES)
def test_it_is_what_launches_compute(geometry: FfnGeometry) -> None:
    """Two models, layers and numbers of rows beside each other."""
    models = [
        [layer_of(geometry, torch.bfloat16, 2 * model + layer) for layer in range(2)] for model in range(2)
    ]
    plan = plan_ffn(geometry, MOST_ROWS, torch.bfloat16, CHIP)
    compute(plan, [(models[0], 1, 8), (models[1], 0, 3), (models[0], 0, 1)], programs=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_in_other_types(dtype: torch.dtype) -> None:
    geometry = GEOMETRIES["shared"]
    plan = plan_ffn(geometry, 4, dtype, CHIP)
    compute(plan, [([layer_of(geometry, dtype)], 0, 4)], programs=2)


def test_weights_in_8_bits_that_the_kernel_converts() -> None:
    geometry = FfnGeometry(136, 40, routing=Routing(3, 2), shared_width=72, float8=True)
    plan = plan_ffn(geometry, 2, torch.bfloat16, CHIP._replace(has_float8=False))
    compute(plan, [([layer_of(geometry, torch.bfloat16)], 0, 2)], programs=2)


@pytest.mark.parametrize("programs", [1, 2, 5])
def test_however_many_programs_there_are(programs: int) -> None:
    """More than some steps have tiles, and one for all. Experts in groups, more than fit one look."""
    geometry = FfnGeometry(48, 24, routing=Routing(140, 9, "sigmoid", True, 2.5, 4, 2, "top2_sum", True))
    layer = layer_of(geometry, torch.bfloat16)
    bias = torch.randn(140, generator=torch.Generator().manual_seed(1))
    layer = replace(layer, words={**layer.words, words.SELECTION_BIAS: bias})
    compute(plan_ffn(geometry, 8, torch.bfloat16, CHIP), [([layer], 0, 7)], programs=programs)


def test_all_rows_may_choose_one_expert() -> None:
    geometry = FfnGeometry(48, 24, routing=Routing(5, 1, biased=True))
    layer = layer_of(geometry, torch.bfloat16)
    layer.words[words.SELECTION_BIAS] = torch.tensor([0.0, 0.0, 0.0, 100.0, 0.0])
    compute(plan_ffn(geometry, 8, torch.bfloat16, CHIP), [([layer], 0, 8), ([layer], 0, 0)], programs=2)


def test_more_rows_than_one_tile_is_meant_for_are_refused() -> None:
    plan = plan_ffn(GEOMETRIES["dense"], 9, torch.bfloat16, CHIP)
    with pytest.raises(ValueError, match="2 resident programs for 9 rows; 8 is the most"):
        resident_room(plan, 2, CPU)
    with pytest.raises(ValueError, match="0 resident programs for 8 rows"):
        resident_room(plan._replace(capacity=8), 0, CPU)
