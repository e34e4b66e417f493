"""From the start of the server's process to the first token of the first request, and the memory it took.

The files are in the system's page cache, and what a contender compiles once is compiled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial

from peers.checkpoints import KINDS, prepare
from peers.load import closed_loop
from peers.one_model import CONTENDERS, SLOTS
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Contender, Need
from peers.turns import Measured, Result, take_turns

EXPERIMENTS = (
    Experiment(
        "cold-start",
        "process start to first token, and memory after a prompt and four streams",
        CONTENDERS,
        KINDS,
    ),
)


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    (experiment,) = experiments
    contenders, sizes = bench.contenders_of(experiment), bench.sizes
    for checkpoint in prepare(bench.models_of(experiment)).values():
        needs = [Need(checkpoint, SLOTS, sizes.prompt + sizes.short_prompt + sizes.output)]
        measures = {one.name: partial(measure, one, needs, sizes) for one in contenders}
        turns = take_turns(measures, sizes.starts, bench.limit, warm_up=False)
        commands = {one.name: one.commands(needs) for one in contenders}
        yield Result(experiment.name, checkpoint.name, turns, commands)


def measure(one: Contender, needs: Sequence[Need], sizes: Sizes, number: int) -> Measured:
    (checkpoint,) = [need.checkpoint for need in needs]
    with one.serve(needs) as deployment, deployment.awake():
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
