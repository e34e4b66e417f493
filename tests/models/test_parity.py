"""Every family against its public implementation: same log-probabilities, same greedy tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from crosspool.models.moe_decoder import ffn
from crosspool.models.weights import shard_ffn
from helpers_model_configs import CONFIGS
from helpers_models import PagedModel, public_logprobs, random_model, save_model

pytestmark = pytest.mark.backend

TOLERANCE = 1e-4
PROMPT = [(37 * i + 11 * i * i) % 97 for i in range(45)]
CHUNKS = (7, 12, 20, 1)
"""Cuts in the middle of a page of 19 tokens, at its end, across one, and a chunk of one token."""
GENERATED = 64


@dataclass(frozen=True)
class Case:
    """A checkpoint through our loader, what it generates, and what the public implementation says of it."""

    paged: PagedModel
    whole: Tensor
    generated: list[int]
    decoded: Tensor
    public: Tensor


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = random_model(CONFIGS[request.param]())
    paged = PagedModel(save_model(model, tmp_path_factory.mktemp("model")))
    whole = paged.prefill("whole", PROMPT)
    generated, decoded = paged.greedy("whole", int(whole[-1].argmax()), GENERATED)
    return Case(paged, whole, generated, decoded, public_logprobs(model, PROMPT + generated))


def difference(ours: Tensor, public: Tensor) -> float:
    return float((ours - public).abs().max())


def test_the_models_have_something_to_say(case: Case) -> None:
    assert 1 < case.public.std() < 20
    assert len(case.public.argmax(-1).unique()) >= 8
    assert len(case.paged.layout.groups) >= 2
    assert case.paged.layout.tokens_per_page == 19


def test_a_prompt_in_one_piece(case: Case) -> None:
    assert difference(case.whole, case.public[: len(PROMPT)]) < TOLERANCE


def test_a_prompt_in_chunks(case: Case) -> None:
    chunked = case.paged.prefill("chunked", PROMPT, CHUNKS)
    assert difference(chunked, case.public[: len(PROMPT)]) < TOLERANCE


def test_decode_steps(case: Case) -> None:
    assert difference(case.decoded, case.public[len(PROMPT) :]) < TOLERANCE


def test_greedy_tokens(case: Case) -> None:
    """The public model, given our tokens so far, chooses each next one too: so its own run is the same."""
    assert case.generated == case.public[len(PROMPT) - 1 : -1].argmax(-1).tolist()


def test_rows_of_a_batch_are_as_alone(case: Case) -> None:
    """A decode, a chunk of a prompt and a short prompt in one pass."""
    paged = case.paged
    paged.prefill("decode", PROMPT)
    paged.prefill("chunk", PROMPT[:20])
    together = paged.run({"decode": case.generated[:1], "chunk": PROMPT[20:40], "short": PROMPT[:3]})
    assert difference(together["decode"], case.decoded[:1]) < TOLERANCE / 10
    assert difference(together["chunk"], case.whole[20:40]) < TOLERANCE / 10
    assert difference(together["short"], case.whole[:3]) < TOLERANCE / 10


@pytest.mark.parametrize("count", [2, 3])
def test_ffn_shards_sum_to_the_whole(case: Case, count: int) -> None:
    hidden = torch.randn(9, case.paged.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    for layer, weights in zip(case.paged.spec.layers, case.paged.ffns, strict=True):
        whole = ffn(layer.ffn, weights, hidden)
        shards = [ffn(layer.ffn, shard_ffn(weights, index, count), hidden) for index in range(count)]
        torch.testing.assert_close(sum(shards), whole, atol=1e-5, rtol=1e-5)
        assert all(difference(shard, whole) > 0.01 for shard in shards)
