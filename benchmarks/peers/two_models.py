"""Two models that decode at once: what each makes of what it makes alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence

from peers.checkpoints import MID, SMALL, prepare
from peers.load import Endpoint, Stream, complete, decode_rate, make_prompt, new_client
from peers.places import PeerError
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Deployment, Need
from peers.side_by_side import side_by_side
from peers.turns import Measured, Result

EXPERIMENTS = (
    Experiment("two-models", "two models decode at once: sum of their shares of alone", ("crosspool:2",)),
)
MODELS = (SMALL, MID)


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    (experiment,) = experiments
    sizes = bench.sizes
    checkpoints = prepare(MODELS)
    needs = [Need(checkpoints[name], 1, sizes.prompt + sizes.output) for name in MODELS]
    yield side_by_side(bench, experiment, " and ".join(MODELS), needs, measure, sizes.rounds)


def measure(deployment: Deployment, sizes: Sizes, number: int) -> Measured:
    """Each alone, then both at once. Rates are those of the time in which both decode."""
    with deployment.awake():
        alone = [_ask([deployment.endpoints[name]], sizes, number + 600)[0] for name in MODELS]
        both = _ask([deployment.endpoints[name] for name in MODELS], sizes, number + 700)
    shares = {
        f"{name}_share": _rate(stream, both) / decode_rate([before])
        for name, before, stream in zip(MODELS, alone, both, strict=True)
    }
    return Measured({"sum_of_shares_ratio": sum(shares.values()), **shares})


def _rate(stream: Stream, all_streams: Sequence[Stream]) -> float:
    """Tokens per second of one of the streams, while all of them decode."""
    begin = max(one.events[0] for one in all_streams)
    end = min(one.events[-1] for one in all_streams)
    if end <= begin:
        raise PeerError("the streams never decoded at the same time: they need more tokens")
    return stream.tokens_per_event * sum(begin < event <= end for event in stream.events) / (end - begin)


def _ask(endpoints: Sequence[Endpoint], sizes: Sizes, seed: int) -> list[Stream]:
    """One request to each at the same time."""
    rng = random.Random(seed)
    prompts = [make_prompt(rng, sizes.short_prompt) for _ in endpoints]

    async def run() -> list[Stream]:
        client, asked = new_client(), zip(endpoints, prompts, strict=True)
        return await asyncio.gather(
            *(complete(client, endpoint, prompt, sizes.output) for endpoint, prompt in asked)
        )

    return asyncio.run(run())
