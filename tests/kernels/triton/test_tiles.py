"""How products are cut."""

from __future__ import annotations

import pytest
import torch

from crosspool.kernels.triton.tiles import Chip, Parts, Tile, is_spread, parts_of, tile_for

pytestmark = pytest.mark.backend

H200 = Chip(shared_bytes=232_448, has_float8=True)
MI300 = Chip(shared_bytes=65_536, has_float8=True)


@pytest.mark.parametrize(
    ("outputs", "inputs", "at_once", "parts"),
    [
        (5120, 2048, 1, Parts(3, 768)),
        (2048, 4096, 1, Parts(8, 512)),
        (576, 2048, 1, Parts(4, 512)),
        (2048, 768, 8, Parts(1, 768)),
        (2048, 1408, 6, Parts(1, 1408)),
        (2048, 10_944, 1, Parts(8, 1408)),
        (151_936, 2048, 1, Parts(1, 2048)),
        (40, 1100, 1, Parts(2, 640)),
        (1, 1, 1, Parts(1, 128)),
    ],
)
def test_parts_fill_a_large_chip_where_outputs_do_not(
    outputs: int, inputs: int, at_once: int, parts: Parts
) -> None:
    assert parts_of(outputs, inputs, at_once) == parts


def test_parts_are_all_inputs_and_whole_steps() -> None:
    for inputs in range(1, 20_000, 37):
        parts = parts_of(64, inputs)
        assert parts.length % 128 == 0
        assert (parts.number - 1) * parts.length < inputs <= parts.number * parts.length


def test_more_tokens_have_wider_tiles() -> None:
    wide = [tile_for(tokens, torch.bfloat16, H200).tokens for tokens in (1, 16, 17, 33, 65, 5000)]
    assert wide == [16, 16, 32, 64, 128, 128]
    assert tile_for(5000, torch.bfloat16, H200, float8=True).tokens == 64


def test_stages_leave_room_for_two_programs() -> None:
    """At least two stages there must be: one is loaded while the other is computed with."""
    assert tile_for(1, torch.bfloat16, H200) == Tile(64, 16, 128, 4, 4)
    for tokens in (1, 17, 64, 5000):
        for dtype, float8 in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)):
            tile = tile_for(tokens, dtype, H200, float8)
            weights = tile.outputs * (1 if float8 else dtype.itemsize)
            assert 2 * tile.stages * tile.step * (weights + tile.tokens * dtype.itemsize) <= 232_448
            assert tile_for(tokens, dtype, MI300, float8).stages >= 2


def test_blocks_with_a_scale_are_whole_steps() -> None:
    for tokens in (1, 5000):
        assert tile_for(tokens, torch.bfloat16, H200, float8=True).step == 128


def test_parts_are_spread_while_programs_are_few() -> None:
    few, many = (tile_for(tokens, torch.bfloat16, H200) for tokens in (1, 5000))
    assert not is_spread(Parts(1, 4096), few, 1)
    assert [is_spread(Parts(8, 512), few, programs) for programs in (32, 255, 256)] == [True, True, False]
    assert [is_spread(Parts(8, 512), many, programs) for programs in (32, 63, 64)] == [True, True, False]
