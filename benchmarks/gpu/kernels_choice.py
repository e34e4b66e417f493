"""Token choice: random logits, and random rules, against the reference. Tokens are equal or they are not."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import torch

from crosspool.core.kv_layout import choose_page_bytes, make_layout
from crosspool.kernels.choice_fields import describe_choice
from crosspool.kernels.triton.choice import choose
from crosspool.kernels.triton.words import LANE_WORDS, ROWS
from crosspool.models.geometries import find_geometry
from crosspool.models.registry import read_spec
from crosspool.workers.cuda.geometry import Geometry
from crosspool.workers.cuda.lane import carve_head
from gpu.device import Gpu
from gpu.errors import misses
from gpu.models import in_room
from gpu.results import Case, Figure
from helpers_choice import expected, random_logits, random_rules

VOCABULARIES = (151_936, 50_257, 1000)
ROWS_AT_ONCE = 8


def choose_random(gpu: Gpu, vocabulary: int, rounds: int) -> list[Figure]:
    folder = find_geometry("qwen3-30b-a3b")
    assert folder is not None
    spec = replace(read_spec(folder), vocab_size=vocabulary)
    geometry = Geometry.of(spec, make_layout(spec, choose_page_bytes([spec])))
    rng, wrong = random.Random(0), 0
    rooms = in_room(gpu, lambda room: carve_head(room, geometry, ROWS_AT_ONCE))
    lane = torch.zeros(LANE_WORDS, dtype=torch.int64)
    lane[ROWS] = ROWS_AT_ONCE
    lane = lane.to(gpu.at)
    for _ in range(rounds):
        rules = [random_rules(rng, vocabulary) for _ in range(ROWS_AT_ONCE)]
        logits = torch.stack([random_logits(rng, vocabulary) for _ in rules])
        wanted = [expected(rule, own.clone()) for rule, own in zip(rules, logits, strict=True)]
        fields = [torch.from_numpy(describe_choice(**rule, steps=1)).to(gpu.at) for rule in rules]
        choices = torch.tensor([own.data_ptr() for own in fields], device=gpu.at)
        chosen = torch.full((ROWS_AT_ONCE,), -7, dtype=torch.int64, device=gpu.at)
        choose(lane, choices, logits.to(gpu.at), rooms.choice, chosen)
        wrong += sum(a != b for a, b in zip(chosen.tolist(), wanted, strict=True))
    return [Figure("tokens", rounds * ROWS_AT_ONCE), misses("tokens", wrong)]


def cases(gpu: Gpu) -> list[Case]:
    vocabularies, rounds = ((300,), 1) if gpu.interpreted else (VOCABULARIES, 6)
    return [
        Case(f"choice of {size} tokens", partial(choose_random, gpu, size, rounds)) for size in vocabularies
    ]
