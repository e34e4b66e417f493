"""Two teams whose memory both see, for the kernels that store into each other's memory and raise flags."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import helpers_triton  # noqa: F401
from crosspool.kernels.triton.crossing import (
    FLAG_WORDS,
    RAISED,
    SENT,
    TAKEN,
    Carried,
    Flag,
    receive,
    send,
)
from crosspool.kernels.triton.words import FAILED, LANE_WORDS, QUERIES, ROWS

MOST_QUERIES, WIDTH = 5, 2100
PATIENCE = 1_000_000
"""Looks; interpreted, one takes tens of microseconds."""


class Team:
    """``words``, ``flags`` and zeros of a lane on one device, and what it reads and writes: ``states`` [T,
    WIDTH] and ``extra`` [T, 2, 3]."""

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self.words = torch.zeros(LANE_WORDS, dtype=torch.int64, device=device)
        self.flags = torch.zeros(2, FLAG_WORDS, dtype=torch.int64, device=device)
        self.zeros = torch.zeros(1, dtype=torch.int32, device=device)
        self.states = torch.full((MOST_QUERIES, WIDTH), -1.0, device=device)
        self.extra = torch.full((MOST_QUERIES, 2, 3), -1, dtype=torch.int32, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        return [self.words, self.flags, self.zeros, self.states, self.extra]

    def share(self) -> None:
        """With processes to which it is sent."""
        for tensor in self.tensors:
            tensor.share_memory_()

    def flag_to(self, other: Team) -> Flag:
        there = other.flags[self.number]
        sent = self.flags[other.number, SENT : SENT + 1]
        return Flag(sent, there[RAISED : RAISED + 1], there[TAKEN : TAKEN + 1], self.zeros)

    def carried_to(self, other: Team) -> Carried:
        return [(other.states, self.states), (other.extra, self.extra)]

    def send(self, other: Team, *, tells: bool) -> None:
        sizes = other.words if tells else None
        send(self.words, self.carried_to(other), sizes, self.flag_to(other))

    def receive(self, other: Team, most_looks: int = PATIENCE) -> None:
        receive(self.words, other.flag_to(self), most_looks)

    @property
    def failed(self) -> bool:
        return bool(self.words[FAILED])

    @property
    def queries(self) -> int:
        return int(self.words[QUERIES])


def answer(own: Team, home: Team, laps: int) -> None:
    """The remote's part: the sum of all that has come, and then one more of each."""
    for _ in range(laps):
        own.receive(home)
        own.states[: own.queries] = own.states[: own.queries].mean(1, keepdim=True) + 1
        own.extra[: own.queries] += 1
        own.send(home, tells=False)


def ask(own: Team, remote: Team, laps: int, seed: int) -> None:
    """The home's part: numbers that were never sent before, for any number of queries. Raises AssertionError
    if it is answered with others."""
    rng = random.Random(seed)
    for lap in range(laps):
        queries = own.words[QUERIES] = own.words[ROWS] = rng.randrange(MOST_QUERIES + 1)
        own.states.fill_(lap)
        own.extra.fill_(lap)
        own.send(remote, tells=True)
        own.receive(remote)
        assert not own.failed, f"lap {lap} was not answered"
        assert own.states[:queries].eq(lap + 1).all() and own.extra[:queries].eq(lap + 1).all(), lap
        assert own.states[queries:].eq(lap).all() and own.extra[queries:].eq(lap).all(), lap
