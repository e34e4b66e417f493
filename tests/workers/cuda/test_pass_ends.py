"""How a grant's rows go through its passes on the device, against core/batch.py row_after."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from crosspool.core.batch import Grant, Phase, Row, TokenChoice, row_after
from crosspool.core.errors import InvariantError
from crosspool.core.ids import NULL_PAGE, GrantId, KvDevice, ModelIndex, Nanoseconds, PageId, RequestId
from crosspool.core.kv_layout import KvLayout, LayerGroup
from crosspool.core.sampling import SamplingParams
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.grant_words import END, FAILURE, RECORD_WORDS, SILENCE, TOKEN
from crosspool.kernels.triton.pass_again import ask_again
from crosspool.kernels.triton.pass_begin import PassRows, begin_pass, enter, find_pages
from crosspool.kernels.triton.pass_end import end_pass
from crosspool.kernels.triton.words import AGAIN, FAILED, LANE_WORDS, MODEL_WORDS, QUERIES, ROWS
from crosspool.workers.cuda.grant import GrantMemory, PackedGrant
from helpers_devices import InterpretedDevice
from helpers_triton_gates import ALL_TARGETS, Target, assert_builds_well, needs_interpreter

pytestmark = [pytest.mark.backend, needs_interpreter]

LAYOUT = KvLayout(4096, 16, (LayerGroup((0,), None), LayerGroup((1,), None)), 128, (0, 1), (0, 0))
MOST_ROWS, MOST_QUERIES, MOST_CHUNKS, RING = 6, 64, 8, 16
FIRST_PAGE = 70
PAGES = range(FIRST_PAGE, FIRST_PAGE + 1000)
MODEL = (10, 20, 30, 40, 50)


class Lane:
    """A lane's arrays, and a host that reads its ring; tokens are chosen by hand."""

    def __init__(self) -> None:
        self.device = InterpretedDevice()
        self.memory = GrantMemory(self.device, 1 << 16)

        def array(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.full(shape, -99, dtype=dtype)

        words = torch.zeros(LANE_WORDS, dtype=torch.int64)
        self.batch = Pass(
            words,
            array(MOST_ROWS + 1),
            array(MOST_ROWS),
            array(MOST_QUERIES),
            array(MOST_ROWS, 2, MOST_CHUNKS),
        )
        longs = [array(MOST_ROWS, dtype=torch.int64) for _ in range(2)]
        self.rows = PassRows(array(MOST_QUERIES), array(MOST_ROWS), *longs)
        self.records = torch.zeros(RING, RECORD_WORDS, dtype=torch.int64)
        self.written = torch.zeros(1, dtype=torch.int64)
        self.read = 0

    def put(self, grant: Grant) -> PackedGrant:
        packed = PackedGrant(grant, MODEL, LAYOUT, self.memory, PAGES)
        packed.target.copy_(packed.source)
        enter(self.batch.lane, packed.address)
        return packed

    def begin(self) -> list[tuple[int, int, list[int], list[list[int]]]]:
        """(number, first position, tokens, page tables) of each row of the pass."""
        begin_pass(self.batch, self.rows, MOST_ROWS)
        lane = self.batch.lane.tolist()
        assert tuple(lane[:MODEL_WORDS]) == MODEL
        starts = self.batch.starts.tolist()
        passed = []
        for place in range(lane[ROWS]):
            begin, end = starts[place], starts[place + 1]
            assert self.batch.row_of[begin:end].tolist() == [place] * (end - begin)
            pages = [group.tolist() for group in self.batch.pages[place]]
            tokens = self.rows.tokens[begin:end].tolist()
            passed.append((int(self.rows.numbers[place]), int(self.batch.firsts[place]), tokens, pages))
        assert starts[lane[ROWS]] == lane[QUERIES]
        return passed

    @property
    def again(self) -> bool:
        """Whether a loop would make one more pass."""
        return bool(self.batch.lane[AGAIN])

    def asks_again(self) -> bool:
        ask_again(self.batch.lane)
        return self.again

    def end(self, tokens: dict[int, int]) -> list[tuple[int, ...]]:
        """Rows choose these tokens. Returns what is written for the host: kind, grant, row, token, made."""
        for place, number in enumerate(self.rows.numbers.tolist()):
            self.rows.chosen[place] = tokens.get(number, -77)
        end_pass(self.batch.lane, self.rows, MOST_ROWS, self.records, self.written)
        seen = []
        for sequence in range(self.read + 1, int(self.written) + 1):
            words = self.records[(sequence - 1) % RING].tolist()
            assert words[0] == sequence
            seen.append(tuple(words[1:6]) if words[1] == TOKEN else tuple(words[1:3]))
        self.read = int(self.written)
        return seen


def random_row(rng: random.Random, number: int, phase: Phase, steps: int) -> Row:
    first = rng.randrange(0, 30)
    count = 1 if phase is Phase.DECODE else rng.randrange(1, 9)
    steps = rng.randrange(1, steps + 2)
    chunks = LAYOUT.chunks(first + count + steps)
    pages = tuple(tuple(PageId(FIRST_PAGE + rng.randrange(1000)) for _ in range(chunks)) for _ in range(2))
    index = rng.randrange(5)
    choice = TokenChoice(
        params=SamplingParams(
            temperature=0, min_tokens=rng.choice((0, 0, index + 2)), max_tokens=99, frequency_penalty=0.1
        ),
        seed=0,
        output_index=index,
        remaining=rng.choice((steps, steps + 1, 50)),
        stop_token_ids=frozenset(rng.sample(range(6), rng.randrange(3))),
        prompt=tuple(range(rng.randrange(5))),
    )
    tokens = tuple(rng.randrange(100, 200) for _ in range(count))
    if phase is Phase.PREFILL and rng.random() < 0.4:
        return Row(RequestId(number), first, tokens, pages, None, 0)
    return Row(RequestId(number), first, tokens, pages, choice, steps)


def random_grant(rng: random.Random, number: int) -> Grant:
    phase = rng.choice((Phase.DECODE, Phase.DECODE, Phase.PREFILL))
    steps = 1 if phase is Phase.PREFILL else rng.randrange(1, 6)
    rows = tuple(random_row(rng, i, phase, steps) for i in range(rng.randrange(1, MOST_ROWS + 1)))
    zero = Nanoseconds(0)
    return Grant(GrantId(number), ModelIndex(0), phase, KvDevice(0), rows, steps, zero, zero, zero)


def run(lane: Lane, rng: random.Random, number: int) -> str:
    """One random grant to its end beside a plain model of it. Returns why it ended."""
    grant = random_grant(rng, number)
    packed = lane.put(grant)
    alive = dict(enumerate(grant.rows))
    made, position = dict.fromkeys(alive, 0), {i: row.start for i, row in alive.items()}
    inputs = {i: list(row.tokens) for i, row in alive.items()}
    dropped: set[int] = set()
    assert not lane.asks_again(), "the host has let it make none"
    for step in range(grant.steps + 1):
        held = rng.randrange(grant.steps + 1)
        packed.hold(held)
        assert lane.asks_again() == (grant.steps - step > held)
        if rng.random() < 0.15:
            victim = rng.randrange(len(grant.rows))
            packed.drop(RequestId(victim))
            dropped.add(victim)
        alive = {i: row for i, row in alive.items() if i not in dropped}
        passed = lane.begin()
        assert [(n, first, tokens) for n, first, tokens, _ in passed] == [
            (i, position[i], inputs[i]) for i in alive
        ]
        for n, _, _, pages in passed:
            for own, given in zip(pages, grant.rows[n].pages, strict=True):
                assert own[: len(given)] == [page - FIRST_PAGE for page in given]
        if recalled := rng.random() < 0.1:
            packed.recall()
        if alive and rng.random() < 0.1:
            # In the midst of a pass: it is computed, but not told, and does not go on.
            victim = rng.choice(list(alive))
            packed.drop(RequestId(victim))
            dropped.add(victim)
        tokens = {i: rng.randrange(6) for i in alive}
        fails = rng.random() < 0.05 and any(row.choice for row in alive.values())
        if fails:
            tokens[rng.choice([i for i, row in alive.items() if row.choice])] = -1
        wanted: list[tuple[int, ...]] = []
        for i, row in list(alive.items()):
            if row.choice is None:
                del alive[i]
                continue
            made[i] += 1
            position[i], inputs[i] = position[i] + len(inputs[i]), [tokens[i]]
            if i not in dropped:
                wanted.append((TOKEN, number, i, tokens[i], made[i]))
            if i in dropped or row_after(row, made[i], tokens[i])[1]:
                del alive[i]
        seen = lane.end(tokens)
        over = fails or recalled or not alive or step + 1 == grant.steps
        end = (FAILURE if fails else END, number)
        assert seen == ([] if fails else wanted) + [end] * over
        assert lane.again == (not over and grant.steps - step - 1 > held)
        if over:
            packed.hold(0)
            assert lane.begin() == [] and lane.end({}) == [] and not lane.asks_again()
            lane.memory.give_back(packed.span)
            return "fails" if fails else "recalled" if recalled else "empty" if not alive else "steps"
    raise AssertionError("it did not end")


def test_grants_go_through_their_passes_as_the_contract_says() -> None:
    rng, lane = random.Random(5), Lane()
    before = lane.memory.free_bytes
    ends = [run(lane, rng, number) for number in range(200)]
    assert set(ends) == {"fails", "recalled", "empty", "steps"}
    assert lane.memory.free_bytes == before and len(lane.memory._free) == 1
    assert lane.read > 3 * RING


def test_a_grant_of_a_lane_that_has_failed_ends_without_a_token() -> None:
    lane = Lane()
    lane.put(replace(random_grant(random.Random(0), 7), phase=Phase.DECODE))
    assert lane.begin() != []
    lane.batch.lane[FAILED] = 1
    assert lane.end(dict.fromkeys(range(MOST_ROWS), 3)) == [(SILENCE, 7)]
    assert lane.begin() == [] and lane.end({}) == []
    assert {run(lane, random.Random(seed), 8 + seed) for seed in range(5)} <= {"steps", "empty", "recalled"}


def test_a_grant_whose_rows_are_all_dropped_ends_with_its_first_pass() -> None:
    lane = Lane()
    grant = replace(random_grant(random.Random(0), 7), phase=Phase.DECODE)
    packed = lane.put(grant)
    for row in grant.rows:
        packed.drop(row.request)
    assert lane.begin() == []
    assert lane.end({}) == [(END, 7)]


@pytest.mark.parametrize("target", ALL_TARGETS, ids=str)
def test_the_ends_of_passes_and_what_begins_a_loop_build(target: Target) -> None:
    lane = Lane()
    ends = (lane.batch.lane, lane.rows, MOST_ROWS, lane.records, lane.written)
    assert_builds_well(lambda: end_pass(*ends), target, wide_loads=False)
    assert_builds_well(lambda: ask_again(lane.batch.lane), target, wide_loads=False)


def test_pages_of_other_devices_are_in_the_tables_of_those_alone() -> None:
    """The home's tables say of them what they are; each device finds its own in what it is sent."""
    memory = GrantMemory(InterpretedDevice(), 1 << 16)
    home, others = range(10, 20), [range(10), range(20, 30)]
    pages = ((PageId(12), PageId(3), PageId(29), PageId(10)), (NULL_PAGE, PageId(19), PageId(20), PageId(0)))
    row = replace(random_row(random.Random(0), 0, Phase.DECODE, 1), start=40, pages=pages)
    layout = replace(LAYOUT, groups=(LayerGroup((0,), None), LayerGroup((1,), 16)))
    zero = Nanoseconds(0)
    grant = Grant(GrantId(0), ModelIndex(0), Phase.DECODE, KvDevice(1), (row,), 1, zero, zero, zero)
    with pytest.raises(
        InvariantError, match="request 0 has pages on a KV device that its grant does not name"
    ):
        PackedGrant(grant, MODEL, layout, memory, home, others[:1])
    assert memory.free_bytes == 1 << 16
    lane = Lane()
    packed = PackedGrant(grant, MODEL, layout, lane.memory, home, others)
    packed.target.copy_(packed.source)
    enter(lane.batch.lane, packed.address)
    ((_, _, _, own),) = lane.begin()
    found = [[page if page >= 0 else -1 for page in group[:4]] for group in own]
    assert found == [[2, -1, -1, 0], [-1, 9, -1, -1]]
    for other, wanted in zip(
        others, ([-1, 3, -1, -1, -1, -1, -1, 0], [-1, -1, 9, -1, -1, -1, 0, -1]), strict=True
    ):
        theirs = lane.batch._replace(pages=lane.batch.pages.clone())
        find_pages(theirs, other.start, len(other))
        assert theirs.pages[0, :, :4].flatten().tolist() == wanted
        assert theirs.pages[1:].eq(-99).all()
