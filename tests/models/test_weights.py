"""FFN weights and their shards."""

import pytest
import torch

from crosspool.kernels.interface import ExpertWeights
from crosspool.models.weights import FfnWeights, shard_ffn

pytestmark = pytest.mark.backend


def expert(width: int) -> ExpertWeights:
    return ExpertWeights(torch.randn(width, 4), torch.randn(width, 4), torch.randn(4, width))


def weights(width: int, shared: int | None = None) -> FfnWeights:
    return FfnWeights(
        router=torch.randn(3, 4),
        selection_bias=torch.randn(3),
        experts=(expert(width), expert(width), expert(width)),
        shared=None if shared is None else expert(shared),
        mapped=True,
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("width", [1, 5, 6])
def test_shards_put_together_are_the_whole(width: int, count: int) -> None:
    whole = weights(width, shared=2 * width + 1)
    shards = [shard_ffn(whole, index, count) for index in range(count)]
    for number in range(3):
        parts = [shard.experts[number] for shard in shards]
        assert torch.equal(torch.cat([part.gate for part in parts]), whole.experts[number].gate)
        assert torch.equal(torch.cat([part.up for part in parts]), whole.experts[number].up)
        assert torch.equal(torch.cat([part.down for part in parts], dim=1), whole.experts[number].down)
        widths = [len(part.gate) for part in parts]
        assert max(widths) - min(widths) <= 1
    assert whole.shared is not None
    assert torch.equal(torch.cat([shard.shared.gate for shard in shards if shard.shared]), whole.shared.gate)
    for shard in shards:
        assert shard.router is whole.router
        assert shard.selection_bias is whole.selection_bias


def test_shards_are_views() -> None:
    whole = weights(6)
    shard = shard_ffn(whole, 1, 2)
    whole.experts[2].down[:, 3:] = 7.0
    assert shard.experts[2].down.eq(7.0).all()
    assert shard.mapped
    assert shard.shared is None


def test_bytes() -> None:
    assert weights(5).bytes == 4 * (3 * 4 + 3 + 3 * 3 * 4 * 5)
    assert weights(5, shared=2).bytes == weights(5).bytes + 4 * 3 * 4 * 2
    halves = [shard_ffn(weights(5, shared=3), index, 2) for index in range(2)]
    assert sum(half.bytes for half in halves) == weights(5, shared=3).bytes + 4 * (3 * 4 + 3)
