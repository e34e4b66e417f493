"""Devices that run what is in their streams some time, in any order that streams and events allow; and a
model of which every value depends on all that came before it, so that whatever is read too early, or written
too late, changes the tokens.

The model's hidden states are pairs of whole numbers, kept in float32 exactly. In a layer, attention mixes a
token's state with what is in the pages at this position and the one before, and the FFN with the number of
the model, which is what its layers' words lead to.
"""

from __future__ import annotations

import ctypes
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crosspool.core.batch import Phase
from crosspool.core.errors import DeviceError
from crosspool.kernels.triton import grant_words as g
from crosspool.kernels.triton import words as w
from crosspool.kernels.triton.batch import Pass
from crosspool.kernels.triton.tiles import Chip
from crosspool.workers.cuda.attention import HomeSurroundings
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import HiddenStates, Limits, Ring, carve_hidden, carve_pass
from crosspool.workers.cuda.room import Room
from helpers_devices import aligned_bytes

PRIME = 65_521
VOCAB = 50


class World:
    """All streams of all devices. ``step`` runs one thing that may run now, chosen at random."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.streams: list[FakeStream] = []
        self.lost: set[str] = set()

    def step(self) -> bool:
        """Whether there was anything."""
        able = [stream for stream in self.streams if stream.may_run and stream.device not in self.lost]
        if not able:
            return False
        self.rng.choice(able).run()
        return True


@dataclass(eq=False)
class FakeEvent:
    device: str
    world: World
    happened: bool = False

    def done(self) -> bool:
        if self.device in self.world.lost:
            raise DeviceError(f"{self.device} is lost")
        return self.happened

    def wait(self) -> None:
        while not self.happened:
            assert self.world.step(), "nothing runs, and an event never happens"

    def since(self, earlier: FakeEvent) -> int:
        assert self.happened and earlier.happened and self.device == earlier.device
        return 1000


@dataclass(eq=False)
class FakeStream:
    device: str
    work: deque[Any] = field(default_factory=deque)

    @property
    def may_run(self) -> bool:
        return bool(self.work) and (not isinstance(self.work[0], FakeEvent) or self.work[0].happened)

    def run(self) -> None:
        work = self.work.popleft()
        if not isinstance(work, FakeEvent):
            work()


class FakeDevice:
    """What is put into its streams runs when the world steps."""

    def __init__(self, name: str, world: World) -> None:
        self.name = self.physical = name
        self.chip, self.processors = Chip(1 << 16, True), 2
        self.world = world

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return aligned_bytes(torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(*shape)

    pinned = tensor

    def stream(self, *, urgent: bool) -> FakeStream:
        self.world.streams.append(FakeStream(self.name))
        return self.world.streams[-1]

    def _put(self, stream: FakeStream, work: Any) -> None:
        assert stream.device == self.name
        if self.name in self.world.lost:
            raise DeviceError(f"{self.name} is lost")
        stream.work.append(work)

    def run(self, stream: FakeStream, launches: Callable[[], object]) -> None:
        self._put(stream, launches)

    def copy(self, stream: FakeStream, target: Tensor, source: Tensor) -> None:
        self._put(stream, lambda: target.copy_(source))

    def record(self, stream: FakeStream) -> FakeEvent:
        event = FakeEvent(self.name, self.world)
        self._put(stream, lambda: setattr(event, "happened", True))
        return event

    def wait(self, stream: FakeStream, event: FakeEvent) -> None:
        self._put(stream, event)

    def capture(self, stream: FakeStream, launches: Callable[[], object]) -> Callable[[], object]:
        return launches

    def replay(self, stream: FakeStream, graph: Callable[[], object]) -> None:
        self._put(stream, graph)

    def finish(self) -> None:
        while self.world.step():
            pass

    def seal(self) -> None:
        pass

    def check_sealed(self) -> None:
        pass


def at(address: int, count: int, kind: type = ctypes.c_int64) -> np.ndarray:
    """Memory at an address."""
    return np.ctypeslib.as_array((kind * count).from_address(int(address)))


# -- the model ---------------------------------------------------------------------------------------------


def mixed(*values: float) -> int:
    total = 7
    for value in values:
        total = (total * 31 + int(value)) % PRIME
    return total


def embedded(token: int) -> tuple[int, int]:
    return mixed(token), mixed(token, 1)


def attended(state: tuple[int, int], layer: int, before: int) -> tuple[tuple[int, int], int]:
    """A state after attention, and what goes into the pages."""
    key = mixed(*state, layer)
    return (mixed(key, before), state[0]), key


def fed(state: tuple[int, int], layer: int, model: int, part: int) -> tuple[int, int]:
    return mixed(*state, layer, model, part), mixed(state[1], part)


def chosen(state: tuple[int, int], position: int) -> int:
    return mixed(*state, position) % VOCAB


@dataclass
class Oracle:
    """What one sequence says, computed alone: keys of each layer by position."""

    model: int
    layers: int
    parts: int
    keys: list[list[int]] = field(default_factory=list)

    def next(self, tokens: Sequence[int]) -> int:
        """The token after these, which follow those before."""
        for token in tokens:
            state, own = embedded(token), list[int]()
            for layer in range(self.layers):
                before = self.keys[-1][layer] if self.keys else 0
                state, key = attended(state, layer, before)
                own.append(key)
                outputs = [fed(state, layer, self.model, part) for part in range(self.parts)]
                state = _sum(state, outputs)
            self.keys.append(own)
        return chosen(state, len(self.keys) - 1)


def _sum(state: tuple[float, float], outputs: Sequence[tuple[float, float]]) -> tuple[int, int]:
    first, second = (sum(values) for values in zip(state, *outputs, strict=True))
    return int(first) % PRIME, int(second) % PRIME


# -- its kernels -------------------------------------------------------------------------------------------


def position_of(batch: Pass, query: int) -> tuple[int, int]:
    """Its row, and where it is in it."""
    row = int(batch.row_of[query])
    return row, int(batch.firsts[row]) + query - int(batch.starts[row])


def key_place(batch: Pass, arena: Tensor, tokens: int, layer: int, query: int, back: int) -> Tensor | None:
    """Where the key of the position so far ``back`` of a query's is, unless there is none, or elsewhere."""
    row, position = position_of(batch, query)
    position -= back
    page = int(batch.pages[row, 0, position // tokens]) if position >= 0 else -1
    return None if page < 0 else arena[page].view(torch.int64)[layer * tokens + position % tokens :][:1]


def put_pair(target: Tensor, query: int, state: tuple[int, int]) -> None:
    target[query] = torch.tensor(state)


class FakeSides:
    """Makes of workers/cuda/sides.py what computes the model above. ``numbers`` says which model the layers'
    words at an address are."""

    def __init__(self, numbers: dict[int, int]) -> None:
        self.numbers = numbers

    def enter(self, lane: Tensor, grant: int) -> None:
        lane[w.GRANT] = grant
        lane[: w.MODEL_WORDS] = torch.from_numpy(at(grant, w.MODEL_WORDS).copy())

    def lead(self, lane: Tensor, layers: int, frequencies: int) -> None:
        lane[w.LAYERS] = layers

    def attention(
        self,
        geometry: Geometry,
        limits: Limits,
        phase: Phase,
        around: HomeSurroundings,
        ring: Ring,
        room: Room,
    ) -> FakeAttention:
        return FakeAttention(geometry, limits, around, ring, room)

    def ffn(
        self, geometry: Geometry, queries: int, part: int, parts: int, chip: Chip, lane: Tensor, room: Room
    ) -> FakeFfn:
        return FakeFfn(self.numbers, part, lane)


class FakeFfn:
    def __init__(self, numbers: dict[int, int], part: int, lane: Tensor) -> None:
        self._numbers, self._part, self._lane = numbers, part, lane

    def ffn(self, layer: int, normed: Tensor, out: Tensor) -> None:
        queries = int(self._lane[w.QUERIES])
        if queries:
            model = self._numbers[int(self._lane[w.LAYERS])]
            for query in range(queries):
                out[query] = torch.tensor(fed(tuple(normed[query].tolist()), layer, model, self._part))


class FakeAttention:
    """See attention_side.AttentionSidePass; pages hold int64 keys, [layer][token]."""

    def __init__(
        self, geometry: Geometry, limits: Limits, around: HomeSurroundings, ring: Ring, room: Room
    ) -> None:
        self.batch, self.rows = carve_pass(room, geometry, limits)
        self.hidden: HiddenStates = carve_hidden(room, geometry, limits.queries, around.parts)
        self._layers, self._tokens = geometry.num_layers, geometry.layout.tokens_per_page
        self._arena, self._ring = around.arena, ring
        self.lane = self.batch.lane

    def _grant(self) -> tuple[np.ndarray, np.ndarray]:
        address = int(self.lane[w.GRANT])
        grant = at(address, g.GRANT_WORDS)
        rows = at(address + 8 * g.GRANT_WORDS, int(grant[g.GRANT_ROWS]) * g.ROW_WORDS)
        return grant, rows.reshape(-1, g.ROW_WORDS)

    def begin(self) -> None:
        grant, rows = self._grant()
        flags = at(grant[g.FLAGS], 1 + len(rows))
        going = [] if grant[g.GRANT_OVER] else range(len(rows))
        place, query = 0, 0
        for number in going:
            row = rows[number]
            if row[g.DONE] or not flags[g.WANTED + number]:
                continue
            count = int(row[g.COUNT])
            tokens = [row[g.NEXT]] if row[g.MADE] else at(row[g.INPUTS], count, ctypes.c_int32).tolist()
            chunks = int(row[g.CHUNKS])
            pages = at(row[g.TABLES], self.batch.pages.shape[1] * chunks, ctypes.c_int32)
            self.batch.pages[place, :, :chunks] = torch.from_numpy(pages.reshape(-1, chunks).copy())
            self.batch.starts[place], self.batch.firsts[place] = query, int(row[g.FIRST])
            self.rows.numbers[place], self.rows.choices[place] = number, int(row[g.CHOICE])
            for token in tokens:
                self.batch.row_of[query] = place
                self.hidden.stream[query] = torch.tensor(embedded(int(token)))
                query += 1
            place += 1
        self.batch.starts[place] = query
        self.lane[w.ROWS], self.lane[w.QUERIES] = place, query

    def _key(self, layer: int, query: int, back: int) -> Tensor | None:
        return key_place(self.batch, self._arena, self._tokens, layer, query, back)

    def _stream(self, query: int) -> tuple[int, int]:
        outputs = [tuple(part.tolist()) for part in self.hidden.outputs[:, query]]
        return _sum(tuple(self.hidden.stream[query].tolist()), outputs)

    def _input(self, layer: int, query: int) -> tuple[int, int]:
        return self._stream(query) if layer else tuple(self.hidden.stream[query].tolist())

    def attention(self, layer: int) -> None:
        for query in range(int(self.lane[w.QUERIES])):
            before, place = self._key(layer, query, 1), self._key(layer, query, 0)
            state, key = attended(self._input(layer, query), layer, 0 if before is None else int(before))
            assert place is not None
            place[0] = key
            for target in (self.hidden.stream, self.hidden.normed):
                put_pair(target, query, state)

    def head(self) -> None:
        for row in range(int(self.lane[w.ROWS])):
            query = int(self.batch.starts[row + 1]) - 1
            self.rows.chosen[row] = chosen(self._stream(query), position_of(self.batch, query)[1])
        self.end()

    def end(self) -> None:
        """As kernels/triton/pass_end.py; there are no stop tokens."""
        grant, rows = self._grant()
        if grant[g.GRANT_OVER]:
            return
        flags, going = at(grant[g.FLAGS], 1 + len(rows)), False
        for place in range(int(self.lane[w.ROWS])):
            number = int(self.rows.numbers[place])
            row, token = rows[number], int(self.rows.chosen[place])
            row[g.FIRST] += row[g.COUNT]
            row[g.COUNT] = 1
            if row[g.CHOICE] == 0:
                row[g.DONE] = 1
                continue
            row[g.MADE] += 1
            row[g.NEXT] = token
            row[g.DONE] = row[g.MADE] in (row[g.ROW_STEPS], row[g.REMAINING])
            if flags[g.WANTED + number]:
                self._tell(g.TOKEN, int(grant[g.NUMBER]), number, token, int(row[g.MADE]))
                going |= not row[g.DONE]
        grant[g.GRANT_STEPS] -= 1
        if flags[g.RECALLED] or grant[g.GRANT_STEPS] == 0 or not going:
            grant[g.GRANT_OVER] = 1
            self._tell(g.END, int(grant[g.NUMBER]), 0, 0, 0)

    def _tell(self, kind: int, *values: int) -> None:
        records = int(self.lane[w.RECORDS])
        words = [records + 1, kind, *values]
        self._ring.records[records % len(self._ring.records), : len(words)] = torch.tensor(words)
        self.lane[w.RECORDS] = records + 1
        self._ring.written[0] = records + 1
