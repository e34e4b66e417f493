"""What weights rounded to 8 bits are worth: CrossPool's decode with them and with bf16."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from peers.checkpoints import MID, SMALL, prepare
from peers.load import closed_loop, decode_rate
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Deployment, Need
from peers.side_by_side import side_by_side
from peers.turns import Measured, Result

EXPERIMENTS = (
    Experiment(
        "int8",
        "decode of one stream with int8 weights and with bf16",
        ("crosspool-int8:2", "crosspool:2"),
        (SMALL, MID),
    ),
)


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    (experiment,) = experiments
    sizes = bench.sizes
    for name, checkpoint in prepare(bench.models_of(experiment)).items():
        needs = [Need(checkpoint, 1, sizes.prompt + sizes.output)]
        yield side_by_side(bench, experiment, name, needs, partial(measure, name), sizes.rounds)


def measure(model: str, deployment: Deployment, sizes: Sizes, number: int) -> Measured:
    with deployment.awake():
        streams = closed_loop(
            deployment.endpoints[model],
            streams=1,
            prompt_tokens=sizes.short_prompt,
            output_tokens=sizes.output,
            seed=number + 1300,
        )
    values = {"tokens_per_second": decode_rate(streams), "pss_mb": deployment.proportional_bytes() / 1e6}
    return Measured(values, {"tbt_ms": [1000 * gap for stream in streams for gap in stream.gaps]})
