"""From the start of the server's process to the first token of the first request, and the memory it took.

The files are in the system's page cache, and what a contender compiles once is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from peers.checkpoints import Checkpoint, prepare
from peers.load import closed_loop
from peers.one_model import CONTENDERS, SLOTS
from peers.plan import Bench, Sizes
from peers.servers import Contender, Need, contender
from peers.turns import Measured, Result, take_turns

EXPERIMENTS = {"cold-start": "process start to first token; peak memory after a prompt and four streams"}


def run(bench: Bench, names: Sequence[str]) -> Iterator[Result]:
    contenders = bench.contenders or [contender(name) for name in CONTENDERS]
    for checkpoint in prepare(bench.models).values():
        measures = {one.name: partial(measure, one, checkpoint, bench.sizes) for one in contenders}
        for name in names:
            turns = take_turns(measures, bench.sizes.starts, bench.limit, warm_up=False)
            yield Result(name, checkpoint.name, turns)


def measure(one: Contender, checkpoint: Checkpoint, sizes: Sizes, number: int) -> Measured:
    context = sizes.prompt + sizes.short_prompt + sizes.output
    with one.serve([Need(checkpoint, SLOTS, context)]) as deployment, deployment.awake():
        endpoint = deployment.endpoints[checkpoint.name]
        (stream,) = closed_loop(endpoint, streams=1, prompt_tokens=8, output_tokens=8, seed=number)
        seconds = stream.events[0] - deployment.started
        first_request = time.perf_counter() - stream.sent
        for streams, prompt in ((1, sizes.prompt), (4, sizes.short_prompt)):
            closed_loop(
                endpoint,
                streams=streams,
                prompt_tokens=prompt,
                output_tokens=sizes.output,
                seed=number + 10 * streams,
            )
        values = {
            "first_token_s": seconds,
            "first_request_s": first_request,
            "peak_rss_mb": deployment.peak_bytes() / 1e6,
            "pss_mb": deployment.proportional_bytes() / 1e6,
        }
    return Measured(values)
