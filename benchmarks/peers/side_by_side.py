"""Experiments whose servers all fit into memory: they are started once and take turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

from peers.company import warm_up
from peers.plan import Bench, Experiment, Sizes
from peers.servers import Deployment, Need
from peers.turns import Measured, Result, take_turns

MeasureDeployment = Callable[[Deployment, Sizes, int], Measured]


def side_by_side(
    bench: Bench,
    experiment: Experiment,
    subject: str,
    needs: Sequence[Need],
    measure: MeasureDeployment,
    rounds: int,
) -> Result:
    """Serve ``needs`` with every contender, and measure all deployments ``rounds`` times in turns."""
    contenders = bench.contenders_of(experiment)
    with ExitStack() as stack:
        measures = {}
        for one in contenders:
            deployment = stack.enter_context(one.serve(needs))
            warm_up(deployment, bench.sizes, seed=1)
            measures[one.name] = partial(measure, deployment, bench.sizes)
        turns = take_turns(measures, rounds, bench.limit, warm_up=False)
    return Result(experiment.name, subject, turns, {one.name: one.commands(needs) for one in contenders})
