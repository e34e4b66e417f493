"""Compiled token choice, against the plain torch reference."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from crosspool.core.batch import Row
from crosspool.core.ids import GrantId, RequestId
from crosspool.kernels.choice_fields import INDEX, describe_choice, read_report
from crosspool.kernels.numba.choice import choice_mine_bytes, choose
from crosspool.kernels.reference.sampling import Choice, choose_tokens
from crosspool.workers.grant_state import ActiveRow
from helpers_choice import expected, random_choice, random_logits, random_rules

pytestmark = pytest.mark.backend


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def chosen(fields: np.ndarray, logits: torch.Tensor) -> int:
    """One more token; the logits given stay as they are, and scratch begins with NaN."""
    row = logits.clone()
    mine = np.full(choice_mine_bytes(len(row)), 0xFF, np.uint8)
    return int(choose(fields, row.data_ptr(), len(row), mine.ctypes.data))


@pytest.mark.parametrize("vocab", [1, 2, 13, 300, 3000])
def test_tokens_are_the_references(vocab: int) -> None:
    rng = random.Random(vocab)
    refused = 0
    for case in range(1500 if vocab < 1000 else 700):
        logits, rules = random_logits(rng, vocab), random_rules(rng, vocab)
        token = chosen(describe_choice(steps=1, **rules), logits)
        assert token == expected(rules, logits), (case, rules)
        refused += token < 0
    assert refused < case / 2


@pytest.mark.parametrize("spread", [0.0, 1e-3, 2.0, 6.0])
def test_a_large_vocabulary(spread: float) -> None:
    logits = torch.randn(50_021, generator=torch.Generator().manual_seed(1)) * spread
    for index in range(20):
        for filters in ({}, {"top_k": 40}, {"top_p": 0.9}, {"top_k": 30_000, "top_p": 0.99}, {"min_p": 0.02}):
            rules = {"seed": 5, "index": index, "temperature": 0.8, **filters}
            assert chosen(describe_choice(steps=1, **rules), logits) == expected(rules, logits)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("place", [0, 700, 4999])
def test_what_is_no_finite_number_is_refused_wherever_it_is(
    bad: float, temperature: float, place: int
) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    logits[place] = bad
    rules = {"seed": 0, "index": 3, "temperature": temperature, "min_tokens": 9, "stop_token_ids": {place}}
    assert expected(rules, logits) == -1
    fields = describe_choice(steps=4, **rules)
    before = fields.copy()
    assert chosen(fields, logits) == -1
    assert (fields == before).all()


def test_nothing_left_is_refused() -> None:
    rules = {"seed": 0, "index": 0, "temperature": 1.0, "min_tokens": 1, "stop_token_ids": [0, 1]}
    assert chosen(describe_choice(steps=1, **rules), torch.tensor([1.0, 2.0])) == -1
    rules["index"] = 1
    assert chosen(describe_choice(steps=1, **rules), torch.tensor([1.0, 2.0])) >= 0
    assert chosen(describe_choice(steps=1, **rules), torch.full((5,), -torch.inf)) == -1


@pytest.mark.parametrize("token", [5, 2**40, -1])
def test_a_penalty_for_what_is_no_token_is_refused(token: int) -> None:
    fields = describe_choice(seed=0, index=0, steps=1, temperature=0, presence=1.0, prompt=[0, token])
    assert chosen(fields, torch.ones(5)) == -1


def test_a_row_goes_through_the_steps_of_a_grant_as_the_workers_rows_do() -> None:
    rng = random.Random(0)
    vocab, steps = 40, 12
    for _ in range(150):
        choice = random_choice(rng, vocab, steps)
        row = ActiveRow(Row(RequestId(1), 0, (0,), (), choice, steps))
        p = choice.params
        fields = describe_choice(
            seed=choice.seed,
            index=choice.output_index,
            steps=steps,
            temperature=p.temperature,
            top_k=p.top_k,
            top_p=p.top_p,
            min_p=p.min_p,
            repetition=p.repetition_penalty,
            presence=p.presence_penalty,
            frequency=p.frequency_penalty,
            min_tokens=p.min_tokens,
            stop_token_ids=choice.stop_token_ids,
            prompt=choice.prompt,
            output=choice.output,
            logprobs=p.logprobs,
        )
        for step in range(steps):
            # Like what a head computes from 16 bits: differences that float32 log-probabilities can tell.
            logits = (torch.randn(vocab, generator=torch.Generator().manual_seed(step)) * 64).round() / 32
            wanted = choose_tokens(logits[None], [row.choice()])[0]
            assert chosen(fields, logits) == wanted.token
            assert fields[INDEX] == choice.output_index + step + 1
            if p.logprobs is not None:
                logprob, rank, top = read_report(fields, step)
                assert rank == wanted.rank
                assert logprob == pytest.approx(wanted.logprob, abs=1e-5)
                assert [token for token, _ in top] == [token for token, _ in wanted.top]
                assert [value for _, value in top] == pytest.approx([v for _, v in wanted.top], abs=1e-5)
            row.take(wanted, GrantId(0))


@pytest.mark.parametrize("alternatives", [0, 1, 7, 20])
@pytest.mark.parametrize("vocab", [3, 3001])
def test_reports_are_the_references(vocab: int, alternatives: int) -> None:
    rng = random.Random(vocab + alternatives)
    for case in range(60):
        logits = (random_logits(rng, vocab) * 16).round() / 16
        rules = random_rules(rng, vocab) | {"index": case, "logprobs": alternatives}
        if expected(rules, logits) < 0:
            continue
        fields = describe_choice(steps=1, **rules)
        token = chosen(fields, logits)
        plain = {"seed": 0, "index": 0, "temperature": 0.0, "logprobs": alternatives}
        # The reference's report of this very token: it is the only one that may be chosen.
        others = [other for other in range(vocab) if other != token]
        wanted = choose_tokens(logits[None], [Choice(**plain, suppressed=others)])[0]
        logprob, rank, top = read_report(fields, 0)
        assert (token, rank) == (wanted.token, wanted.rank)
        assert logprob == pytest.approx(wanted.logprob, rel=1e-6, abs=1e-5)
        assert [identifier for identifier, _ in top] == [identifier for identifier, _ in wanted.top]
        values = [value for _, value in top]
        assert values == pytest.approx([value for _, value in wanted.top], rel=1e-6, abs=1e-5)
