"""Rotary embeddings as public configs spell them, old and new, and the context that follows."""

from math import log
from pathlib import Path
from typing import Any

import pytest

from crosspool.core.errors import CorruptCheckpointError, UnsupportedModelError
from crosspool.core.spec import RopeKind, RopeSpec
from crosspool.models.public_config import PublicConfig
from crosspool.models.rope_config import read_max_context, read_rope, softmax_gain, yarn_mscale

pytestmark = pytest.mark.unit

YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 2,
    "mscale": 0.9,
    "mscale_all_dim": 0.7,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(**values: Any) -> PublicConfig:
    return PublicConfig(Path("config.json"), values, {"max_position_embeddings": 4096, "rope_theta": 10000.0})


def rope(**values: Any) -> RopeSpec:
    return read_rope(config(**values), 64)


def test_without_any_key_it_is_the_default_of_the_class() -> None:
    assert rope() == RopeSpec(dim=64, theta=10000.0)
    assert rope(rope_scaling=None, rope_theta=5e5) == RopeSpec(dim=64, theta=5e5)
    assert read_rope(config(), 6, interleaved=True).interleaved


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("default", {}),
        ("linear", {"factor": 2.0}),
        ("dynamic", {"factor": 2.0}),
        ("yarn", YARN),
        ("llama3", LLAMA3),
    ],
)
def test_old_and_new_spellings_mean_the_same(kind: str, values: dict[str, Any]) -> None:
    oldest = rope(rope_theta=7e5, rope_scaling={"type": kind, **values})
    old = rope(rope_theta=7e5, rope_scaling={"rope_type": kind, **values})
    new = rope(rope_parameters={"rope_type": kind, "rope_theta": 7e5, **values})
    nested = rope(
        rope_parameters={
            name: {"rope_type": kind, "rope_theta": 7e5, **values}
            for name in ("full_attention", "sliding_attention")
        }
    )
    assert oldest == old == new == nested
    assert oldest.theta == 7e5
    assert oldest.kind is RopeKind(kind)


def test_where_both_spellings_are_present_the_old_one_counts() -> None:
    """As the public config classes have it."""
    both = rope(
        rope_scaling={"type": "linear", "factor": 3.0},
        rope_parameters={"rope_type": "linear", "factor": 2.0},
    )
    assert both.factor == 3.0


def test_every_field_of_a_variant_is_read() -> None:
    yarn = rope(rope_scaling={"type": "yarn", "truncate": False, "attention_factor": 1.5, **YARN})
    assert (yarn.factor, yarn.original_max_position, yarn.beta_fast, yarn.beta_slow) == (40, 4096, 32, 2)
    assert (yarn.mscale, yarn.mscale_all_dim, yarn.attention_factor, yarn.truncate) == (0.9, 0.7, 1.5, False)
    llama3 = rope(rope_scaling={"rope_type": "llama3", **LLAMA3, "low_freq_factor": 2.0})
    assert (llama3.low_freq_factor, llama3.high_freq_factor, llama3.original_max_position) == (2.0, 4.0, 8192)


def test_yarn_defaults() -> None:
    yarn = rope(rope_scaling={"type": "yarn", "factor": 4.0})
    assert (yarn.original_max_position, yarn.beta_fast, yarn.beta_slow) == (4096, 32, 1)
    assert (yarn.mscale, yarn.mscale_all_dim, yarn.attention_factor, yarn.truncate) == (
        None,
        None,
        None,
        True,
    )
    stretched = rope(
        rope_scaling={"type": "yarn", "factor": None, "original_max_position_embeddings": 1024},
        max_position_embeddings=8192,
    )
    assert stretched.factor == 8.0


def test_a_trained_length_outside_the_parameters_goes_first() -> None:
    yarn = rope(rope_scaling={"type": "yarn", **YARN}, original_max_position_embeddings=2048)
    assert yarn.original_max_position == 2048


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({}, 4096),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "linear", "factor": 1e308}}, 2**31 - 1),
        ({"rope_scaling": {"type": "yarn", "factor": 1e308}}, 2**31 - 1),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 16384),
        ({"rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 163840}, 163840),
        ({"rope_scaling": {"type": "yarn", **YARN}, "max_position_embeddings": 4096}, 163840),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}, "max_position_embeddings": 131072}, 131072),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, 4096),
        (
            {
                "rope_scaling": {
                    "type": "dynamic",
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                }
            },
            1024,
        ),
    ],
)
def test_context(values: dict[str, Any], context: int) -> None:
    """Dynamic scaling is served up to the trained length only: beyond, cached keys would not fit."""
    given = config(**values)
    assert read_max_context(given, read_rope(given, 64)) == context


def test_gain_of_latent_attention() -> None:
    assert softmax_gain(rope()) == 1.0
    assert softmax_gain(rope(rope_scaling={"type": "yarn", "factor": 40})) == 1.0
    with_mscale = rope(rope_scaling={"type": "yarn", **YARN})
    assert softmax_gain(with_mscale) == pytest.approx((0.1 * 0.7 * log(40) + 1) ** 2)
    assert yarn_mscale(1.0) == 1.0
    assert yarn_mscale(0.5, 3.0) == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, "is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}, "0.25"),
        (
            {"rope_parameters": {"full_attention": {"factor": 1}, "sliding_attention": {"factor": 2}}},
            "differ between layer types",
        ),
    ],
)
def test_variants_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        rope(**values)


def test_an_odd_rotary_dimension_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="even number of elements, not 7"):
        read_rope(config(), 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_scaling": [1]}, "rope_parameters must be an object"),
        ({"rope_theta": 0}, "rope_theta must be a number above 0"),
        ({"rope_theta": 1.0}, "rope_theta must be a number above 1, not 1.0"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 1}},
            "above low_freq_factor 1",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings must be 1 to",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number above 0, not None"),
        ({"rope_scaling": {"type": "dynamic", "factor": "2"}}, "factor must be a number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor must be"),
        ({"rope_scaling": {"type": "yarn", **YARN, "beta_fast": "x"}}, "beta_fast must be"),
    ],
)
def test_fields_that_are_wrong(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CorruptCheckpointError, match=message):
        rope(**values)
