"""The compiled half with latent attention, against the torch layer and against itself in other company."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from crosspool.core.spec import MlaSpec, RopeSpec
from crosspool.kernels.interface import AttentionBatch
from crosspool.kernels.numba.batch import KvPlace
from crosspool.kernels.numba.matrix import CODES, Int8Weight, quantise
from crosspool.kernels.numba.mla import mla_half, mla_mine_bytes, mla_room_bytes
from crosspool.kernels.numba.mla_fields import MlaTensors, describe_mla
from crosspool.models.layers import PagedLayer, RopeTable, mla
from crosspool.models.weights import MlaWeights
from helpers_attention_half import State, assert_near, chunk_of, drawn, with_places
from helpers_paged_kv import TOKENS_PER_PAGE, paged_rows
from helpers_passes import on_a_team, pass_of

pytestmark = pytest.mark.backend

ROWS = [(0, 1), (600, 1), (0, 13), (250, 20), (511, 2)]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
SPEC = MlaSpec(
    num_heads=3,
    q_lora_rank=None,
    kv_lora_rank=19,
    qk_nope_head_dim=11,
    qk_rope_head_dim=6,
    v_head_dim=7,
    scale=0.3,
)
WIDE = replace(
    SPEC, num_heads=16, q_lora_rank=50, kv_lora_rank=64, qk_nope_head_dim=32, v_head_dim=40, bias=True
)
SPECS = {"narrow": SPEC, "query latent": replace(SPEC, q_lora_rank=23), "wide": WIDE}
HIDDEN = 45
REGION = 3
"""The layer's region is the third in its page, so others must stay as they are."""


def make_weights(spec: MlaSpec, dtype: torch.dtype) -> MlaWeights:
    heads, rank, nope, value = spec.num_heads, spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim
    rotary, down = spec.qk_rope_head_dim, spec.q_lora_rank
    shapes: dict[str, tuple[int, ...]] = {
        "query": (heads * (nope + rotary), down or HIDDEN),
        "latent": (rank + rotary, HIDDEN),
        "latent_norm": (rank,),
        "expand_key": (heads, nope, rank),
        "expand_value": (heads, value, rank),
        "output": (HIDDEN, heads * value),
    }
    if down is not None:
        shapes |= {"query_down": (down, HIDDEN), "query_norm": (down,)}
    if spec.bias:
        shapes |= {"query_down_bias": (down or 0,), "latent_bias": (rank + rotary,), "output_bias": (HIDDEN,)}
    tensors = {name: drawn(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    tensors |= {name: 1 + tensors[name] for name in ("latent_norm", "query_norm") if name in tensors}
    return MlaWeights(**{name: (2 * tensor).to(dtype) for name, tensor in tensors.items()})


def tensors_of(weights: MlaWeights) -> MlaTensors:
    return MlaTensors(**{name: getattr(weights, name) for name in MlaTensors._fields})


class Layer:
    """A layer, rows in its pages, and both ways to compute it."""

    def __init__(self, spec: MlaSpec, dtype: torch.dtype, interleaved: bool = True) -> None:
        self.spec, self.dtype, self.interleaved = spec, dtype, interleaved
        self.weights = make_weights(spec, dtype)
        self.tensors = tensors_of(self.weights)
        self.rope = RopeTable(RopeSpec(spec.qk_rope_head_dim, 1e4, interleaved=interleaved), 4096)
        width = spec.kv_elements_per_token
        rows = paged_rows(ROWS, (width,))
        self.batch, self.elements = with_places(rows.batch), TOKENS_PER_PAGE * width
        arena = torch.full((len(rows.pages), 4 * self.elements), torch.nan)
        arena[:, REGION * self.elements :] = rows.pages.flatten(1)
        self.arena = arena.to(dtype)
        total = self.batch.query_starts[-1]
        self.normed = 6 * drawn(total, HIDDEN, seed=20).to(dtype)
        self.residual = 6 * drawn(total, HIDDEN, seed=21).to(dtype)

    def expected(self, window: int | None) -> State:
        arena = self.arena.clone()
        kv = PagedLayer(arena[:, REGION * self.elements :], self.batch, 1, window)
        attended = mla(self.spec, self.weights, self.normed, self.rope, kv)
        return State(self.residual + attended, arena)

    def computed(
        self,
        batch: AttentionBatch,
        part: slice,
        arena: Tensor | None = None,
        window: int | None = None,
        threads: int = 1,
    ) -> State:
        """One pass of the batch, whose queries are ``part`` of the layer's, in the arena (None: a copy)."""
        arena = self.arena.clone() if arena is None else arena
        hidden, normed = self.residual[part].clone(), self.normed[part].contiguous()
        fields, kept = describe_mla(
            self.tensors,
            rotary=self.spec.qk_rope_head_dim,
            scale=self.spec.scale,
            epsilon=self.spec.latent_norm_eps,
            interleaved=self.interleaved,
        )
        seen = pass_of(batch, self.dtype, HIDDEN, self.rope.at(batch))
        size = arena.element_size()
        kv = KvPlace(
            arena.data_ptr(),
            arena.stride(0) * size,
            REGION * self.elements * size,
            TOKENS_PER_PAGE,
            1,
            window or 0,
        )

        def run(shared: int, own: np.ndarray, room: int, mine: int) -> None:
            mla_half(shared, own, fields, normed.data_ptr(), seen, kv, room, mine, hidden.data_ptr())

        on_a_team(run, threads, mla_room_bytes(fields, len(hidden)), mla_mine_bytes(fields, seen.rows))
        assert kept.is_contiguous()
        return State(hidden, arena)


EVERYTHING = slice(None)


@pytest.mark.parametrize("window", [None, 6, 300])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_it_is_the_reference(dtype: torch.dtype, spec: MlaSpec, window: int | None) -> None:
    layer = Layer(spec, dtype)
    computed = layer.computed(layer.batch, EVERYTHING, window=window, threads=2)
    assert_near(computed, layer.expected(window), TOLERANCE[dtype])


def test_rotary_halves() -> None:
    layer = Layer(SPEC, torch.float32, interleaved=False)
    assert_near(layer.computed(layer.batch, EVERYTHING), layer.expected(None), 3e-6)


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_int8_matrices(dtype: torch.dtype) -> None:
    layer = Layer(WIDE, dtype)
    names = ("query", "latent", "output", "query_down")
    small = {name: quantise(getattr(layer.weights, name)) for name in names}
    layer.tensors = layer.tensors._replace(**small)
    layer.weights = replace(layer.weights, **{name: wide(own).to(dtype) for name, own in small.items()})
    # The torch layer rounds the quantised weights to its own type.
    assert_near(layer.computed(layer.batch, EVERYTHING), layer.expected(None), 1.5 * TOLERANCE[dtype])


def wide(weight: Int8Weight) -> Tensor:
    return weight.values * weight.scales.unsqueeze(1)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_a_row_has_the_same_bits_alone_in_any_chunks_and_on_any_number_of_threads(
    dtype: torch.dtype, spec: MlaSpec
) -> None:
    layer = Layer(spec, dtype)
    together = layer.computed(layer.batch, EVERYTHING)
    threaded = layer.computed(layer.batch, EVERYTHING, threads=3)
    assert torch.equal(threaded.hidden, together.hidden)
    arena = layer.arena.clone()
    for row, (_, queries) in enumerate(ROWS):
        for first, last in pairwise(
            sorted({0, 1, 2, queries // 2, queries - 1, queries} & set(range(queries + 1)))
        ):
            alone, part = chunk_of(layer.batch, row, first, last)
            assert torch.equal(layer.computed(alone, part, arena, threads=2).hidden, together.hidden[part])
    assert torch.equal(arena.view(torch.uint8), together.arena.view(torch.uint8))
    assert torch.equal(threaded.arena.view(torch.uint8), together.arena.view(torch.uint8))


def test_matrices_that_do_not_fit_are_refused() -> None:
    own = tensors_of(make_weights(SPEC, torch.float32))
    rules = {"rotary": 6, "scale": 1.0, "epsilon": 1e-6, "interleaved": True}
    with pytest.raises(ValueError, match=r"rank 19 with 3 heads of 11 \+ 6 and values of 7 does not fit"):
        describe_mla(own._replace(output=torch.ones(HIDDEN, 20)), **rules)
    with pytest.raises(ValueError, match="neither int8 nor"):
        describe_mla(own._replace(output=torch.ones(HIDDEN, 21).bfloat16()), **rules)
    with pytest.raises(ValueError, match="is not contiguous"):
        describe_mla(own._replace(latent_norm=torch.ones(38)[::2]), **rules)
