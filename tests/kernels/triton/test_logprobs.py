"""Log-probabilities on the device, against the plain torch reference; and that what begins and ends a pass
builds well."""

from __future__ import annotations

import random

import pytest
import torch

from crosspool.kernels.choice_fields import INDEX, describe_choice, read_report
from crosspool.kernels.reference.sampling import Choice, choose_tokens
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.grant_words import RECORD_WORDS
from crosspool.kernels.triton.logprobs import report
from crosspool.kernels.triton.pass_begin import PassRows, begin_pass, enter
from crosspool.kernels.triton.pass_end import end_pass
from crosspool.kernels.triton.words import LANE_WORDS, ROWS
from helpers_choice import random_logits
from helpers_triton import DEVICE
from helpers_triton_gates import assert_builds_well, needs_interpreter, on_targets

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("vocab", [3, 5000])
def test_reports_are_the_references(vocab: int) -> None:
    """The second report of each row, which go where a mirror of the fields is."""
    rng = random.Random(vocab)
    for case in range(0, 12, 3):
        wanted = [rng.choice((0, 1, 4, 20)) for _ in range(3)]
        logits = torch.stack([(random_logits(rng, vocab) * 16).round() / 16 for _ in range(3)])
        logits[:, 0] = 0.5
        tokens = [rng.choice([i for i in range(vocab) if row[i] > -torch.inf]) for row in logits]
        fields = [
            torch.from_numpy(describe_choice(seed=0, index=case, steps=2, temperature=0, logprobs=number))
            for number in wanted
        ]
        for own in fields:
            own[INDEX] += 2
        both = torch.stack([torch.nn.functional.pad(own, (0, 200 - len(own))) for own in fields])
        both = torch.cat([both, both]).to(DEVICE)
        lane = torch.zeros(LANE_WORDS, dtype=torch.int64)
        lane[ROWS] = 3
        choices = torch.tensor([row.data_ptr() for row in both[:3]], device=DEVICE)
        chosen = torch.tensor(tokens, device=DEVICE)
        report(lane.to(DEVICE), choices, logits.to(DEVICE), chosen, 3 * 200 * 8)
        assert torch.equal(
            both[:3].cpu(), torch.stack([torch.nn.functional.pad(f, (0, 200 - len(f))) for f in fields])
        )
        for row, number in enumerate(wanted):
            others = [other for other in range(vocab) if other != tokens[row]]
            how = Choice(seed=0, index=0, temperature=0.0, logprobs=number, suppressed=others)
            (own,) = choose_tokens(logits[row : row + 1], [how])
            logprob, rank, top = read_report(both[3 + row].cpu().numpy(), 1)
            assert rank == own.rank and logprob == pytest.approx(own.logprob, rel=1e-6, abs=1e-5)
            assert [token for token, _ in top] == [token for token, _ in own.top]
            assert [value for _, value in top] == pytest.approx([v for _, v in own.top], rel=1e-6, abs=1e-5)


ROWS_AT_MOST, QUERIES = 32, 512


def begin_and_end() -> None:
    def array(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype)

    lane = array(LANE_WORDS, dtype=torch.int64)
    rows = ROWS_AT_MOST
    batch = Pass(lane, array(rows + 1), array(rows), array(QUERIES), array(rows, 3, 2600))
    longs = [array(rows, dtype=torch.int64) for _ in range(2)]
    own = PassRows(array(QUERIES), array(rows), *longs)
    enter(lane, 2**40)
    begin_pass(batch, own, rows)
    end_pass(lane, own, rows, array(4096, RECORD_WORDS, dtype=torch.int64), array(1, dtype=torch.int64))
    report(lane, own.choices, array(rows, 151_936, dtype=torch.float32), own.chosen, -(2**40) - 1)


@needs_interpreter
@on_targets({"begin and end of a pass": begin_and_end})
def test_they_build_well(launch, target) -> None:
    assert_builds_well(launch, target, wide_loads=False)
