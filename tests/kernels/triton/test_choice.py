"""Token choice on the device, against the plain torch reference."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from crosspool.kernels.choice_fields import INDEX, describe_choice
from crosspool.kernels.triton.choice import ChoiceRoom, blocks_of, choose
from crosspool.kernels.triton.words import LANE_WORDS, ROWS
from helpers_choice import expected, random_logits, random_rules
from helpers_triton import DEVICE
from helpers_triton_gates import assert_builds_well, needs_interpreter, on_targets

pytestmark = pytest.mark.backend


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def room_of(rows: int, vocab: int) -> ChoiceRoom:
    """Full of what is no number."""
    blocks = blocks_of(vocab)

    def full(width: int, dtype: torch.dtype) -> torch.Tensor:
        size = rows * width * dtype.itemsize
        return torch.full((size,), 255, dtype=torch.uint8, device=DEVICE).view(dtype).view(rows, width)

    return ChoiceRoom(
        altered=full(vocab, torch.float32),
        largest=full(blocks, torch.float32),
        places=full(blocks, torch.int32),
        sums=full(blocks, torch.float64),
        counts=full(blocks, torch.int32),
        weights=full(vocab, torch.float64),
        ids=full(vocab, torch.int32),
    )


def chosen(fields: list[np.ndarray], logits: torch.Tensor) -> list[int]:
    """One more token of each row, beside a row that chooses nothing and one that is not there."""
    count, vocab = logits.shape
    kept = [torch.from_numpy(own).to(DEVICE) for own in fields]
    choices = torch.tensor([own.data_ptr() for own in kept] + [0, 1], device=DEVICE)
    lane = torch.zeros(LANE_WORDS, dtype=torch.int64)
    lane[ROWS] = count + 1
    given = torch.cat([logits, torch.full((2, vocab), math.nan)]).to(DEVICE)
    out = torch.full((count + 2,), -7, device=DEVICE)
    choose(lane.to(DEVICE), choices, given, room_of(count + 2, vocab), out)
    assert out[-2:].tolist() == [-7, -7]
    for own, after in zip(fields, kept, strict=True):
        own[:] = after.cpu().numpy()
    return out[:-2].tolist()


@pytest.mark.parametrize(("vocab", "cases"), [(1, 40), (2, 120), (13, 200), (300, 100), (3000, 30)])
def test_tokens_are_the_references(vocab: int, cases: int) -> None:
    """Rows of a batch, each with its own rules; several blocks at the largest vocabulary."""
    rng = random.Random(vocab)
    refused = 0
    for case in range(0, cases, 4):
        logits = torch.stack([random_logits(rng, vocab) for _ in range(4)])
        rules = [random_rules(rng, vocab) for _ in range(4)]
        tokens = chosen([describe_choice(steps=1, **own) for own in rules], logits)
        for row, own in enumerate(rules):
            assert tokens[row] == expected(own, logits[row]), (case, own)
        refused += sum(token < 0 for token in tokens)
    assert refused < cases / 2


@pytest.mark.parametrize("spread", [0.0, 1e-3, 2.0, 6.0])
def test_a_large_vocabulary(spread: float) -> None:
    logits = torch.randn(20_021, generator=torch.Generator().manual_seed(1)) * spread
    filters: list[dict[str, Any]] = [
        {},
        {"top_k": 17},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_k": 9_000, "top_p": 0.99},
        {"min_p": 0.02},
    ]
    rules = [{"seed": 5, "index": i, "temperature": 0.8, **own} for i, own in enumerate(filters)]
    tokens = chosen([describe_choice(steps=1, **own) for own in rules], logits.expand(len(rules), -1))
    assert tokens == [expected(own, logits) for own in rules]


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_no_finite_number_is_refused_wherever_it_is(bad: float, temperature: float) -> None:
    places = [0, 700, 4999]
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(3), torch.tensor(places)] = bad
    fields = [
        describe_choice(
            seed=0, index=3, temperature=temperature, min_tokens=9, stop_token_ids=[place], steps=4
        )
        for place in places
    ]
    before = [own.copy() for own in fields]
    assert chosen(fields, logits) == [-1] * 3
    assert all((own == as_it_was).all() for own, as_it_was in zip(fields, before, strict=True))


def test_nothing_left_is_refused() -> None:
    early = describe_choice(seed=0, index=0, temperature=1.0, min_tokens=1, stop_token_ids=[0, 1], steps=1)
    late = describe_choice(seed=0, index=1, temperature=1.0, min_tokens=1, stop_token_ids=[0, 1], steps=1)
    assert [token >= 0 for token in chosen([early, late], torch.tensor([[1.0, 2.0]] * 2))] == [False, True]
    assert chosen([late], torch.full((1, 5), -torch.inf)) == [-1]


@pytest.mark.parametrize("token", [5, 2**40, -1])
def test_a_penalty_for_what_is_no_token_is_refused(token: int) -> None:
    fields = describe_choice(seed=0, index=0, steps=1, temperature=0, presence=1.0, prompt=[0, token])
    assert chosen([fields], torch.ones(1, 5)) == [-1]


def test_tokens_chosen_are_counted_for_penalties() -> None:
    """A history of two blocks, tokens that were there and tokens that were not."""
    rng = random.Random(3)
    vocab, prompt = 1500, tuple(range(1100))
    rules: dict[str, Any] = {
        "seed": 1, "temperature": 1.5, "top_p": 0.9, "frequency": 2.0, "presence": 0.5, "repetition": 1.2
    }  # fmt: skip
    fields = describe_choice(index=0, steps=20, prompt=prompt, **rules)
    output: list[int] = []
    for index in range(20):
        logits = torch.randn(vocab, generator=torch.Generator().manual_seed(index))
        logits[rng.choice(output or [1400])] += 25
        wanted = expected(rules | {"index": index, "prompt": prompt, "output": output}, logits)
        assert chosen([fields], logits[None]) == [wanted]
        assert fields[INDEX] == index + 1
        output.append(wanted)
    assert len(set(output)) < 20 and min(output) < 1100 < max(output)


def choose_at_real_size() -> None:
    rows, vocab = 32, 151_936
    choose(
        torch.empty(LANE_WORDS, dtype=torch.int64),
        torch.empty(rows, dtype=torch.int64),
        torch.empty(rows, vocab),
        room_of(rows, vocab),
        torch.empty(rows, dtype=torch.int64),
    )


@needs_interpreter
@on_targets({"choose": choose_at_real_size})
def test_it_builds_well(launch, target) -> None:
    assert_builds_well(launch, target, wide_loads=False)
