"""How large the measurements are, and what every experiment is given."""

from __future__ import annotations

from dataclasses import dataclass

from peers.bandwidth import ReadBandwidth
from peers.servers import Contender, contender


@dataclass(frozen=True, slots=True)
class Sizes:
    """Rounds, tokens and seconds. ``rounds`` are those of measurements of one model, whose servers stay up;
    ``starts`` those of measurements that start servers for each turn."""

    rounds: int = 20
    ttft_rounds: int = 10
    starts: int = 3
    short_prompt: int = 64
    output: int = 128
    prompt: int = 512
    long_prompt: int = 8192
    together_repeats: int = 3
    alone_output: int = 512
    busy_seconds: float = 60.0
    busy_prompt: int = 2000
    busy_period: float = 10.0


QUICK = Sizes(
    rounds=3,
    ttft_rounds=2,
    starts=1,
    output=64,
    prompt=128,
    long_prompt=512,
    together_repeats=1,
    alone_output=64,
    busy_seconds=8.0,
    busy_prompt=200,
    busy_period=4.0,
)


@dataclass(frozen=True, slots=True)
class Experiment:
    """What is measured, on which contenders and models if nothing else is asked for.

    ``models`` is empty where they are part of the question. The first contender is compared with the others.
    """

    name: str
    what: str
    contenders: tuple[str, ...]
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Bench:
    """One run. Without ``models`` or ``contenders``, every experiment has its own."""

    sizes: Sizes
    limit: ReadBandwidth
    models: tuple[str, ...] = ()
    contenders: tuple[Contender, ...] = ()

    def models_of(self, experiment: Experiment) -> tuple[str, ...]:
        return self.models or experiment.models

    def contenders_of(self, experiment: Experiment) -> tuple[Contender, ...]:
        return self.contenders or tuple(contender(name) for name in experiment.contenders)
