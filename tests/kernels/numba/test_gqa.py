"""The compiled grouped-query half, against the torch layer and against itself in other company."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from crosspool.core.spec import GqaSpec, RopeSpec
from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.numba.batch import KvPlace
from crosspool.kernels.numba.gqa import gqa_half, gqa_mine_bytes, gqa_room_bytes
from crosspool.kernels.numba.gqa_fields import GqaTensors, describe_gqa
from crosspool.kernels.numba.matrix import CODES, Int8Weight, quantise
from crosspool.kernels.numba.team import ARRIVED, THREADS
from crosspool.models.layers import PagedLayer, RopeTable, gqa
from crosspool.models.weights import GqaWeights
from helpers_attention_half import State, assert_near, chunk_of, chunks_of, drawn, same_bits, with_places
from helpers_paged_kv import TOKENS_PER_PAGE, forget_outside_window, paged_rows
from helpers_passes import on_a_team, pass_of

pytestmark = pytest.mark.backend

ROWS = [(0, 1), (600, 1), (0, 13), (250, 20), (511, 2)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
HIDDEN = 45
EPSILON = 1e-5
REGION = 3
"""The layer's region is the fourth in its page, so others must stay as they are."""

EVERYTHING = slice(None)
MATRICES = ("query", "key", "value", "output")


@dataclass(frozen=True)
class Kind:
    """A layer's shape, and how many of a head's elements are rotated, as neighbours or as halves."""

    spec: GqaSpec
    rotary: int
    interleaved: bool = False


KINDS = {
    "odd": Kind(GqaSpec(6, 2, 13, scale=0.3), 6),
    "one key": Kind(GqaSpec(5, 1, 16, scale=0.25, qkv_bias=True), 16, interleaved=True),
    "norms": Kind(GqaSpec(3, 3, 24, scale=0.2, qk_norm=True), 24),
    "wide": Kind(GqaSpec(16, 4, 72, 0.1, qkv_bias=True, output_bias=True, qk_norm=True), 36, True),
}


def make_weights(spec: GqaSpec, dtype: torch.dtype) -> GqaWeights:
    heads, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "query": (heads, HIDDEN),
        "key": (keys, HIDDEN),
        "value": (keys, HIDDEN),
        "output": (HIDDEN, heads),
    }
    if spec.qkv_bias:
        shapes |= {"query_bias": (heads,), "key_bias": (keys,), "value_bias": (keys,)}
    if spec.output_bias:
        shapes |= {"output_bias": (HIDDEN,)}
    if spec.qk_norm:
        shapes |= {"query_norm": (spec.head_dim,), "key_norm": (spec.head_dim,)}
    tensors = {name: 2 * drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {name: 1 + tensors[name] for name in ("query_norm", "key_norm") if name in tensors}
    return GqaWeights(**{name: tensor.to(dtype) for name, tensor in tensors.items()})


def tensors_of(weights: GqaWeights) -> GqaTensors:
    return GqaTensors(**{name: getattr(weights, name) for name in GqaTensors._fields})


class Layer:
    """A layer, rows in its pages, and both ways to compute it."""

    def __init__(self, kind: Kind, dtype: torch.dtype) -> None:
        self.spec, self.kind, self.dtype = kind.spec, kind, dtype
        self.weights = make_weights(kind.spec, dtype)
        self.tensors = tensors_of(self.weights)
        self.rope = RopeTable(RopeSpec(kind.rotary, 1e4, interleaved=kind.interleaved), 4096)
        width = kind.spec.kv_elements_per_token
        self.rows = paged_rows(ROWS, (width,))
        self.batch, self.elements = with_places(self.rows.batch), TOKENS_PER_PAGE * width
        arena = torch.full((len(self.rows.pages), 5 * self.elements), torch.nan)
        # What is drawn for a page's tokens is as good as any other, in whichever order a page has it.
        keys, values = self.rows.pages.chunk(2, dim=-1)
        arena[:, self.region] = torch.stack((keys, values), dim=1).flatten(1)
        self.arena = arena.to(dtype)
        total = self.batch.query_starts[-1]
        self.normed = 6 * drawn(total, HIDDEN, seed=20).to(dtype)
        self.residual = 6 * drawn(total, HIDDEN, seed=21).to(dtype)

    @property
    def region(self) -> slice:
        return slice(REGION * self.elements, (REGION + 1) * self.elements)

    def expected(self, window: int | None = None) -> State:
        arena = self.arena.clone()
        kv = PagedLayer(arena[:, self.region], self.batch, 1, window)
        attended = gqa(self.spec, self.weights, self.normed, self.rope, kv, EPSILON)
        return State(self.residual + attended, arena)

    def computed(
        self,
        batch: AttentionBatch,
        part: slice = EVERYTHING,
        arena: Tensor | None = None,
        window: int | None = None,
        threads: int = 1,
    ) -> State:
        """One pass of the batch, whose queries are ``part`` of the layer's, in the arena (None: a copy)."""
        return self.counted(batch, part, arena, window, threads)[0]

    def counted(
        self,
        batch: AttentionBatch,
        part: slice = EVERYTHING,
        arena: Tensor | None = None,
        window: int | None = None,
        threads: int = 1,
    ) -> tuple[State, int]:
        """``computed``, and how often the team has met."""
        arena = self.arena.clone() if arena is None else arena
        hidden, normed = self.residual[part].clone(), self.normed[part].contiguous()
        fields = describe_gqa(
            self.tensors,
            heads=self.spec.num_heads,
            kv_heads=self.spec.num_kv_heads,
            scale=self.spec.scale,
            epsilon=EPSILON,
            interleaved=self.kind.interleaved,
        )
        seen = pass_of(batch, self.dtype, HIDDEN, self.rope.at(batch))
        size = arena.element_size()
        page, offset = arena.stride(0) * size, self.region.start * size
        kv = KvPlace(arena.data_ptr(), page, offset, TOKENS_PER_PAGE, 1, window or 0)
        meetings = set()

        def run(shared: int, own: np.ndarray, room: int, mine: int) -> None:
            gqa_half(shared, own, fields, normed.data_ptr(), seen, kv, room, mine, hidden.data_ptr())
            meetings.add(int(own[ARRIVED] // own[THREADS]))

        on_a_team(run, threads, gqa_room_bytes(fields, len(hidden)), gqa_mine_bytes(fields, seen.rows))
        (count,) = meetings
        return State(hidden, arena), count


@pytest.mark.parametrize("window", [None, 6, 300])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_it_is_the_reference(dtype: torch.dtype, kind: Kind, window: int | None) -> None:
    layer = Layer(kind, dtype)
    if window is not None:
        forget_outside_window(layer.rows, window)
    computed = layer.computed(layer.batch, window=window, threads=2)
    assert_near(computed, layer.expected(window), TOLERANCE[dtype])


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_keys_and_values_lie_bit_by_bit_where_the_layout_says(dtype: torch.dtype, kind: Kind) -> None:
    """Sums of small whole numbers are exact in any order, so every rounding shows."""
    layer = Layer(kind, dtype)
    generator = torch.Generator().manual_seed(5)
    for tensor in (layer.normed, *(tensor for tensor in layer.tensors[:7] if tensor is not None)):
        tensor.copy_(torch.randint(-2, 3, tensor.shape, generator=generator))
    computed, expected = layer.computed(layer.batch, threads=2), layer.expected()
    assert same_bits(computed.arena, expected.arena)
    assert not same_bits(computed.arena, layer.arena)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_int8_matrices(dtype: torch.dtype) -> None:
    layer = Layer(KINDS["wide"], dtype)
    small = {name: quantise(getattr(layer.weights, name)) for name in MATRICES}
    layer.tensors = layer.tensors._replace(**small)
    layer.weights = replace(layer.weights, **{name: wide(own).to(dtype) for name, own in small.items()})
    # The torch layer rounds the quantised weights to its own type.
    assert_near(layer.computed(layer.batch), layer.expected(), 1.5 * TOLERANCE[dtype])


def test_int8_matrices_that_do_not_say_the_model_type() -> None:
    layer = Layer(KINDS["odd"], torch.float16)
    small = {name: quantise(getattr(layer.weights, name)) for name in MATRICES}
    layer.tensors = GqaTensors(**small)
    layer.weights = GqaWeights(**{name: wide(own).half() for name, own in small.items()})
    assert_near(layer.computed(layer.batch), layer.expected(), 1.5 * TOLERANCE[torch.float16])


def wide(weight: Int8Weight) -> Tensor:
    return weight.values * weight.scales.unsqueeze(1)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_row_has_the_same_bits_alone_in_any_chunks_and_on_any_number_of_threads(
    dtype: torch.dtype, kind: Kind
) -> None:
    layer = Layer(kind, dtype)
    together = layer.computed(layer.batch)
    threaded = layer.computed(layer.batch, threads=3)
    assert same_bits(threaded.hidden, together.hidden)
    assert same_bits(threaded.arena, together.arena)
    arena = layer.arena.clone()
    for alone, part in chunks_of(layer.batch):
        assert same_bits(layer.computed(alone, part, arena, threads=2).hidden, together.hidden[part])
    assert same_bits(arena, together.arena)


def test_a_team_meets_once_more_where_a_context_is_split() -> None:
    layer = Layer(KINDS["odd"], torch.float32)
    meetings = [layer.counted(*chunk_of(layer.batch, row, 0, 1), threads=2)[1] for row in (0, 1)]
    assert meetings == [4, 5]


RULES = {"heads": 6, "kv_heads": 2, "scale": 1.0, "epsilon": EPSILON, "interleaved": False}
REFUSED = {
    "heads that cannot share": ({}, {"kv_heads": 4}, "6 heads of 13 that share 4 key-value heads do not fit"),
    "no whole heads": ({}, {"heads": 5, "kv_heads": 1}, "5 heads of 15"),
    "few keys": ({"key": torch.ones(13, HIDDEN)}, {}, "do not fit"),
    "wide values": ({"value": torch.ones(26, HIDDEN + 1)}, {}, "do not fit"),
    "narrow output": ({"output": torch.ones(HIDDEN, 77)}, {}, "do not fit"),
    "one norm": ({"key_norm": torch.ones(13)}, {}, "query norm None, key norm \\[13\\]"),
    "a short bias": ({"key_bias": torch.ones(25)}, {}, "key_bias \\[25\\] does not fit, \\[26\\] would"),
    "another type": ({"output": torch.ones(HIDDEN, 78).half()}, {}, "neither int8 nor torch.float32"),
    "strides": ({"key_bias": torch.ones(52)[::2]}, {}, "is not contiguous"),
    "scales": (
        {"key": Int8Weight(torch.ones(26, HIDDEN, dtype=torch.int8), torch.ones(25))},
        {},
        "with scales torch.float32 \\[25\\]",
    ),
}


@pytest.mark.parametrize(("changed", "rules", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_do_not_fit_are_refused(
    changed: dict[str, Tensor], rules: dict[str, int], message: str
) -> None:
    own = tensors_of(make_weights(KINDS["odd"].spec, torch.float32))
    with pytest.raises(ValueError, match=message):
        describe_gqa(own._replace(**changed), **RULES | rules)


def test_a_type_that_no_model_has_is_refused() -> None:
    own = tensors_of(make_weights(KINDS["odd"].spec, torch.float64))
    with pytest.raises(ValueError, match=r"torch\.float64 is not one of"):
        describe_gqa(own, **RULES)
