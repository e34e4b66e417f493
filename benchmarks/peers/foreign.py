"""A decode stream on a machine where somebody else's process keeps one core busy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import psutil

from peers.checkpoints import MID, SMALL, prepare
from peers.company import over_alone
from peers.load import closed_loop, decode_rate
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Deployment, Need
from peers.side_by_side import side_by_side
from peers.turns import Measured, Result

EXPERIMENTS = (
    Experiment(
        "foreign",
        "decode of one stream while a foreign process keeps one core busy",
        ("crosspool:2", "llama.cpp:2"),
        (SMALL, MID),
    ),
)


def run(bench: Bench, experiments: Sequence[Experiment]) -> Iterator[Result]:
    (experiment,) = experiments
    sizes = bench.sizes
    for name, checkpoint in prepare(bench.models_of(experiment)).items():
        needs = [Need(checkpoint, 1, sizes.prompt + sizes.output)]
        yield side_by_side(bench, experiment, name, needs, partial(measure, name), sizes.ttft_rounds)


def measure(model: str, deployment: Deployment, sizes: Sizes, number: int) -> Measured:
    """The stream alone, then beside the foreign process."""
    with deployment.awake():
        alone = _decode(model, deployment, sizes, number + 1100)
        with busy_core():
            beside = _decode(model, deployment, sizes, number + 1200)
    rate, gaps = beside
    values = {"tokens_per_second": rate, **over_alone(gaps, alone[1])}
    return Measured(values, {"tbt_ms": gaps, "tbt_alone_ms": alone[1]})


def _decode(model: str, deployment: Deployment, sizes: Sizes, seed: int) -> tuple[float, list[float]]:
    """Tokens per second, and the milliseconds between events."""
    streams = closed_loop(
        deployment.endpoints[model],
        streams=1,
        prompt_tokens=sizes.short_prompt,
        output_tokens=sizes.output,
        seed=seed,
    )
    return decode_rate(streams), [1000 * gap for stream in streams for gap in stream.gaps]


@contextmanager
def busy_core() -> Iterator[None]:
    """A process of ordinary priority that never rests, on this machine's last core.

    It has a session of its own, like the servers: the system shares cores between sessions first.
    """
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        mine = psutil.Process()
        psutil.Process(process.pid).cpu_affinity([max(mine.cpu_affinity())])
        yield
    finally:
        process.kill()
        process.wait()
