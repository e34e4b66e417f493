"""The one list of experiments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType

from peers import cold_start, eight, foreign, int8, one_model, two_models, while_prefill
from peers.places import PeerError
from peers.plan import Experiment

MODULES: Sequence[ModuleType] = (one_model, cold_start, two_models, while_prefill, eight, foreign, int8)
"""Each has EXPERIMENTS, and ``run(bench, experiments)`` for some of them, which yields their results."""

EXPERIMENTS = {experiment.name: experiment for module in MODULES for experiment in module.EXPERIMENTS}


def chosen(names: Iterable[str]) -> Iterator[tuple[ModuleType, list[Experiment]]]:
    """The modules with those of their experiments that have these names. Raises PeerError for others."""
    names = list(names)
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise PeerError(f"no experiment {', '.join(unknown)}; there are {', '.join(EXPERIMENTS)}")
    for module in MODULES:
        experiments = [experiment for experiment in module.EXPERIMENTS if experiment.name in names]
        if experiments:
            yield module, experiments
