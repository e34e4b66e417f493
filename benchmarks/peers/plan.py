"""How large the measurements are, and what every experiment is given."""

from __future__ import annotations

from dataclasses import dataclass

from peers.bandwidth import ReadBandwidth
from peers.servers import Contender


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
    together_repeats: int = 5
    alone_output: int = 512
    busy_seconds: float = 60.0
    busy_prompt: int = 2000
    busy_period: float = 10.0


QUICK = Sizes(
    rounds=3,
    ttft_rounds=2,
    starts=1,
    output=24,
    prompt=128,
    long_prompt=512,
    together_repeats=1,
    alone_output=48,
    busy_seconds=8.0,
    busy_prompt=200,
    busy_period=4.0,
)


@dataclass(frozen=True, slots=True)
class Bench:
    """One run. ``contenders`` None: each experiment has its own default."""

    sizes: Sizes
    limit: ReadBandwidth
    models: tuple[str, ...]
    contenders: tuple[Contender, ...] | None
