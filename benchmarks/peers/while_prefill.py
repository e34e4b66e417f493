"""One model's decode stream while another model prefills a long prompt.

CrossPool serves both in one server; of the others each model has a process.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

from peers.checkpoints import MID, SMALL, prepare
from peers.company import ANSWER_TOKENS, Reader, in_company, over_alone
from peers.load import Stream, closed_loop, complete, make_prompt, new_client
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Deployment, Need
from peers.side_by_side import side_by_side
from peers.turns import Measured, Result

EXPERIMENTS = (
    Experiment(
        "while-prefill",
        "one stream's TBT while another model prefills a long prompt, over its TBT alone",
        ("crosspool:2", "llama.cpp:2", "llama.cpp:1", "vllm-cpu:1"),
    ),
)


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    (experiment,) = experiments
    sizes = bench.sizes
    checkpoints = prepare((SMALL, MID))
    needs = [
        Need(checkpoints[SMALL], 1, sizes.prompt + sizes.alone_output),
        Need(checkpoints[MID], 1, sizes.long_prompt + ANSWER_TOKENS),
    ]
    yield side_by_side(bench, experiment, f"{SMALL} beside {MID}", needs, measure, sizes.together_repeats)


def measure(deployment: Deployment, sizes: Sizes, number: int) -> Measured:
    with deployment.awake():
        (alone,) = closed_loop(
            deployment.endpoints[SMALL],
            streams=1,
            prompt_tokens=sizes.short_prompt,
            output_tokens=sizes.alone_output,
            seed=number + 300,
        )
        reader = Reader(deployment.endpoints[SMALL], sizes.short_prompt, sizes.alone_output, number + 400)
        prefill = asyncio.run(_prefill_beside(reader, deployment, sizes.long_prompt, number + 500))
    alone_gaps = [1000 * gap for gap in alone.gaps]
    gaps = reader.gaps(prefill.sent, prefill.events[0])
    values = {"prefill_s": prefill.ttft, **over_alone(gaps, alone_gaps)}
    waits = reader.waits(prefill.sent, prefill.events[0])
    return Measured(values, {"tbt_ms": gaps, "tbt_alone_ms": alone_gaps, "stream_ttft_s": waits})


async def _prefill_beside(reader: Reader, deployment: Deployment, prompt_tokens: int, seed: int) -> Stream:
    prompt = make_prompt(random.Random(seed), prompt_tokens)
    client = new_client()
    async with in_company(client, [reader]):
        return await complete(client, deployment.endpoints[MID], prompt, ANSWER_TOKENS)
