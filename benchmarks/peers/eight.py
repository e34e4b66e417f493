"""Eight models on one machine, as in a zoo: four that are talked to all the time, four that get long prompts.

The servers of all contenders do not fit into memory together, so each turn starts its own.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from peers.checkpoints import MID, SMALL, numbered, prepare
from peers.company import ANSWER_TOKENS, LatePrompt, Reader, in_company, warm_up
from peers.load import new_client
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Contender, Deployment, Need
from peers.turns import Measured, Result, take_turns

EXPERIMENTS = (
    Experiment(
        "eight",
        "four small models stream while each of four larger ones gets a long prompt again and again",
        ("crosspool:2", "llama.cpp:1", "llama.cpp:2"),
    ),
)
OF_EACH = 4
SLOTS = 2


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    (experiment,) = experiments
    contenders, sizes = bench.contenders_of(experiment), bench.sizes
    small, mid = numbered(SMALL, OF_EACH), numbered(MID, OF_EACH)
    checkpoints = prepare((*small, *mid))
    needs = [
        *(Need(checkpoints[name], 1, sizes.prompt + sizes.alone_output) for name in small),
        *(Need(checkpoints[name], SLOTS, sizes.busy_prompt + ANSWER_TOKENS) for name in mid),
    ]
    measures = {one.name: partial(measure, one, needs, sizes) for one in contenders}
    turns = take_turns(measures, sizes.starts, bench.limit, warm_up=False)
    commands = {one.name: one.commands(needs) for one in contenders}
    yield Result(experiment.name, f"{OF_EACH} x {SMALL} and {OF_EACH} x {MID}", turns, commands)


def measure(one: Contender, needs: Sequence[Need], sizes: Sizes, number: int) -> Measured:
    with one.serve(needs) as deployment:
        ready_s = time.perf_counter() - deployment.started
        warm_up(deployment, sizes, seed=number + 800)
        readers, prompts = _users(deployment, sizes, 1000 * (number + 1))
        with deployment.awake():
            begin = asyncio.run(_use(readers, prompts, sizes.busy_seconds))
        pss_mb = deployment.proportional_bytes() / 1e6
    end = begin + sizes.busy_seconds
    gaps = [gap for reader in readers for gap in reader.gaps(begin, end)]
    answers = [prompt.answer for prompt in prompts if prompt.answer is not None]
    events = [event for reader in readers for request in reader.requests for event in request]
    values = {
        "tbt_p99_ms": float(np.percentile(gaps, 99)),
        "stream_events_per_second": sum(begin < event <= end for event in events) / sizes.busy_seconds,
        "prompts_finished_share": len(answers) / len(prompts),
        "pss_mb": pss_mb,
        "ready_s": ready_s,
    }
    pools = {
        "tbt_ms": gaps,
        "stream_ttft_s": [wait for reader in readers for wait in reader.waits(begin, end)],
        "prompt_ttft_s": [answer.ttft for answer in answers],
    }
    return Measured(values, pools)


def _users(deployment: Deployment, sizes: Sizes, seed: int) -> tuple[list[Reader], list[LatePrompt]]:
    """A reader of each small model, and the prompts of the others: one a period for each, evenly spread."""
    endpoints = deployment.endpoints
    readers = [
        Reader(endpoints[name], sizes.short_prompt, sizes.alone_output, seed + index)
        for index, name in enumerate(numbered(SMALL, OF_EACH))
    ]
    every = sizes.busy_period / OF_EACH
    names = numbered(MID, OF_EACH)
    prompts = [
        LatePrompt(
            endpoints[names[index % OF_EACH]], sizes.busy_prompt, index * every, seed + OF_EACH + index
        )
        for index in range(math.ceil(sizes.busy_seconds / every))
    ]
    return readers, prompts


async def _use(readers: Sequence[Reader], prompts: Sequence[LatePrompt], seconds: float) -> float:
    """When the first prompt was sent; all end so many seconds later."""
    client = new_client()
    async with in_company(client, readers):
        begin = time.perf_counter()
        async with in_company(client, prompts):
            await asyncio.sleep(seconds)
    return begin
