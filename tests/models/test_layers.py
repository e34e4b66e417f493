"""Rotary frequencies against the public implementation, and the table of positions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from crosspool.core.errors import InvariantError
from crosspool.core.spec import RopeSpec
from crosspool.kernels.interface import AttentionBatch
from crosspool.models.layers import RopeTable, rope_frequencies
from crosspool.models.public_config import PublicConfig
from crosspool.models.rope_config import read_rope

pytestmark = pytest.mark.backend

YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("dim", "theta", "parameters"),
    [
        (128, 10000.0, {"rope_type": "default"}),
        (80, 5e5, {"rope_type": "linear", "factor": 2.5}),
        (64, 1e6, {"rope_type": "dynamic", "factor": 2.0}),
        (64, 10000.0, YARN),
        (64, 10000.0, {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
        (64, 10000.0, {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}),
        (64, 10000.0, {**YARN, "mscale": 1.0}),
        (64, 10000.0, {**YARN, "attention_factor": 1.25, "truncate": False}),
        (128, 1e6, {**YARN, "beta_fast": 16.0, "beta_slow": 2.0, "factor": None}),
        (12, 10000.0, {**YARN, "beta_fast": 4000.0, "beta_slow": 660.0}),
        (12, 10000.0, {**YARN, "beta_fast": 4000.0, "beta_slow": 0.0001, "factor": 1.0}),
        (
            128,
            5e5,
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
    ],
)
def test_frequencies(dim: int, theta: float, parameters: dict[str, Any]) -> None:
    values = {"max_position_embeddings": 131072, "rope_parameters": {**parameters, "rope_theta": theta}}
    ours = read_rope(PublicConfig(Path("config.json"), values, {}), dim)
    public = LlamaRotaryEmbedding(LlamaConfig(head_dim=dim, **values))
    frequencies, gain = rope_frequencies(ours)
    torch.testing.assert_close(frequencies, public.inv_freq, atol=0, rtol=1e-6)
    assert gain == pytest.approx(public.attention_scaling)


def batch(*rows: tuple[int, int]) -> AttentionBatch:
    """Rows of (first position, queries) without pages."""
    starts = [0]
    for _, count in rows:
        starts.append(starts[-1] + count)
    positions = torch.cat([torch.arange(first, first + count) for first, count in rows])
    none = ((),) * len(rows)
    return AttentionBatch(positions, tuple(starts), tuple(first for first, _ in rows), none, (), positions)


def test_the_table_grows_to_what_is_asked_and_keeps_its_values() -> None:
    rope = RopeSpec(dim=8, theta=100.0)
    table = RopeTable(rope, 5000)
    frequencies, _ = rope_frequencies(rope)
    for rows in ([(0, 3)], [(700, 1), (2, 5)], [(4999, 1)], [(1, 1)]):
        cos, sin = table.at(batch(*rows))
        angles = torch.outer(batch(*rows).positions.float(), frequencies)
        torch.testing.assert_close(cos, angles.cos())
        torch.testing.assert_close(sin, angles.sin())


def test_the_gain_is_in_the_table() -> None:
    gained = RopeTable(RopeSpec(dim=8, theta=100.0), 10).at(batch((0, 3)))
    values = {"max_position_embeddings": 4096, "rope_theta": 100.0, "rope_scaling": YARN}
    rope = read_rope(PublicConfig(Path("config.json"), values, {}), 8)
    cos, sin = RopeTable(rope, 10).at(batch((0, 3)))
    assert float(cos[0, 0]) == pytest.approx(rope_frequencies(rope)[1])
    assert float(gained[0][0, 0]) == 1.0
    torch.testing.assert_close(
        cos.square() + sin.square(), torch.full((3, 4), rope_frequencies(rope)[1] ** 2)
    )


def test_beyond_the_context_there_is_nothing() -> None:
    table = RopeTable(RopeSpec(dim=8, theta=100.0), 300)
    table.at(batch((299, 1)))
    with pytest.raises(InvariantError, match="a sequence of 301 tokens, the model's context is 300"):
        table.at(batch((0, 1), (299, 2)))
