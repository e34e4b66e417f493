"""FFN weights and their shards."""

import pytest
import torch

from crosspool.core.spec import FLOAT8_BLOCK, FfnSpec, RouterSpec
from crosspool.kernels.float8 import BLOCK, dequantise_fp8, quantise_fp8
from crosspool.kernels.interface import ExpertWeights
from crosspool.models.weights import FfnWeights, part_of_ffn, shard_ffn

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


def float8(whole: ExpertWeights) -> tuple[ExpertWeights, ExpertWeights]:
    numbers, scales = zip(*(quantise_fp8(matrix) for matrix in whole), strict=True)
    return ExpertWeights(*numbers), ExpertWeights(*scales)


def plain(numbers: ExpertWeights, scales: ExpertWeights) -> ExpertWeights:
    return ExpertWeights(*(dequantise_fp8(*both) for both in zip(numbers, scales, strict=True)))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("width", [128, 384, 385, 500])
def test_float8_is_cut_between_blocks(width: int, count: int) -> None:
    """What is cut and dequantised is what is dequantised and cut, to the last bit."""
    (expert8, scales), (shared8, shared_scales) = float8(expert(width)), float8(expert(2 * width))
    whole = FfnWeights(None, None, (expert8,), shared8, True, (scales,), shared_scales)
    wanted = plain(expert8, scales), plain(shared8, shared_scales)
    shards = [shard_ffn(whole, index, count) for index in range(count)]
    found = (
        [plain(shard.experts[0], shard.expert_scales[0]) for shard in shards],
        [plain(shard.shared, shard.shared_scales) for shard in shards],  # type: ignore[arg-type]
    )
    for parts, own in zip(found, wanted, strict=True):
        assert torch.equal(torch.cat([part.gate for part in parts]), own.gate)
        assert torch.equal(torch.cat([part.up for part in parts]), own.up)
        assert torch.equal(torch.cat([part.down for part in parts], dim=1), own.down)
        blocks = [-(-len(part.gate) // 128) for part in parts]
        assert max(blocks) - min(blocks) <= 1
    assert sum(shard.bytes for shard in shards) == whole.bytes


@pytest.mark.parametrize("is_float8", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_what_shards_are_is_known_before_there_are_any(count: int, is_float8: bool) -> None:
    spec = FfnSpec(300, router=RouterSpec(1, 1), shared_intermediate=140, float8=is_float8)
    whole = FfnWeights(None, None, (expert(300),), expert(140), True)
    if is_float8:
        (expert8, scales), (shared8, shared_scales) = float8(expert(300)), float8(expert(140))
        whole = FfnWeights(None, None, (expert8,), shared8, True, (scales,), shared_scales)
    for index in range(count):
        shard, own = shard_ffn(whole, index, count), part_of_ffn(spec, index, count)
        assert shard.shared is not None
        assert own.intermediate == len(shard.experts[0].gate) == shard.experts[0].down.shape[1]
        assert own.shared_intermediate == len(shard.shared.up)
        assert own.router is spec.router and own.float8 == is_float8


def test_blocks_are_the_kernels() -> None:
    assert FLOAT8_BLOCK == BLOCK


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
