from __future__ import annotations

import numpy as np
import pytest

from crosspool.demo.random_models import (
    deepseek_v2_config,
    deepseek_v2_shapes,
    qwen3_moe_config,
    qwen3_moe_shapes,
    random_tensors,
)
from helpers_bf16 import from_bf16

pytestmark = pytest.mark.unit

TOKENIZER = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": 49152}


@pytest.mark.parametrize(
    "shapes",
    [qwen3_moe_shapes(qwen3_moe_config(TOKENIZER)), deepseek_v2_shapes(deepseek_v2_config(TOKENIZER))],
    ids=["qwen3-moe", "deepseek-v2"],
)
def test_about_a_hundred_million_parameters_under_different_names(shapes) -> None:
    listed = list(shapes)
    assert len({name for name, _ in listed}) == len(listed)
    assert sum(int(np.prod(shape)) for _, shape in listed) == pytest.approx(100e6, rel=0.1)


def test_weights_are_the_same_for_the_same_seed_and_keep_activations_near_one() -> None:
    shapes = [("matrix", (300, 400)), ("norm", (8,))]
    once, again, other = (dict(random_tensors(iter(shapes), seed)) for seed in (5, 5, 6))
    assert np.array_equal(once["matrix"], again["matrix"])
    assert not np.array_equal(once["matrix"], other["matrix"])
    assert from_bf16(once["matrix"]).std() == pytest.approx(400**-0.5, rel=0.02)
    assert np.array_equal(from_bf16(once["norm"]), np.ones(8))
