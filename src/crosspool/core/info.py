"""What an engine says about itself, as plain data that crosses process boundaries."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from crosspool.core.errors import ModelUnavailableError, RequestTooLargeError
from crosspool.core.ids import ModelIndex


class Residency(StrEnum):
    """Where a model's FFN weights are."""

    COLD = "cold"
    LOADING = "loading"
    RESIDENT = "resident"
    PINNED = "pinned"


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One configured model. ``error`` says why it does not serve; it shows no absolute path, and sizes are 0
    then.

    ``weights_dtype`` is that of its large matrices. ``max_context`` is the model's own limit,
    ``max_pool_tokens`` how many tokens one sequence may have in the KV pool, ``max_pool_bytes`` how much of
    the pool all its sequences may hold. ``prefix_cache`` says whether what it computed is kept for later
    prompts: not if that is switched off, or if it has window layers.
    """

    name: str
    index: ModelIndex
    path: str
    architecture: str = ""
    dtype: str = ""
    weights_dtype: str = ""
    vocab_size: int = 0
    max_context: int = 0
    max_pool_tokens: int = 0
    max_pool_bytes: int = 0
    eos_token_ids: tuple[int, ...] = ()
    kv_bytes_per_token: int = 0
    tokens_per_page: int = 0
    layer_groups: int = 0
    prefix_cache: bool = False
    attention_bytes: int = 0
    ffn_bytes: int = 0
    residency: Residency = Residency.COLD
    error: str | None = None

    @property
    def longest(self) -> int:
        """The most tokens that one request may have, prompt and output together."""
        return min(self.max_context, self.max_pool_tokens)

    def check_serves(self) -> None:
        """Raises ModelUnavailableError for a model that failed to load. Clients see it, so it has no path."""
        if self.error is not None:
            raise ModelUnavailableError(
                f"model {self.name} does not serve: it failed to load, and the log says why"
            )

    def check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        """Raises RequestTooLargeError, with the numbers, for what no state of the pool could hold."""
        total = prompt_tokens + max_tokens
        held = f" (all requests of {self.name} together may hold {self.max_pool_bytes:,} bytes of it)"
        for limit, what, note in (
            (self.max_context, f"the context of {self.name}", ""),
            (self.max_pool_tokens, "the KV pool's room for one request", held),
        ):
            if total > limit:
                raise RequestTooLargeError(
                    f"{prompt_tokens} prompt tokens and {max_tokens} to generate are {total} tokens, more "
                    f"than {what}, which is {limit}{note}",
                    parameter="max_tokens",
                )


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine when it is ready: its models and its pools."""

    models: tuple[ModelInfo, ...]
    kv_devices: tuple[str, ...]
    weights_devices: tuple[str, ...]
    page_bytes: int
    kv_pages: int
    kv_pool_bytes: int
    weights_pool_bytes: int
    weights_used_bytes: int
    spill_store_bytes: int = 0

    def model(self, name: str) -> ModelInfo | None:
        return next((model for model in self.models if model.name == name), None)


@dataclass(frozen=True, slots=True)
class ModelStats:
    """Counters (since start) and gauges (now) of one model. ``cached_tokens`` of ``prompt_tokens`` were not
    computed but taken from the prefix cache, which ``prefix_cache`` says the model has. Spilled is what was
    copied to host memory at a preemption, returned what came back."""

    name: str
    running: int = 0
    waiting: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generation_tokens: int = 0
    kv_pages_held: int = 0
    prefix_cache: bool = False
    cached_pages_evicted: int = 0
    finished: dict[str, int] | None = None
    spilled_sequences: int = 0
    spilled_bytes: int = 0
    returned_sequences: int = 0
    returned_bytes: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot for /metrics. Pages held (by model), cached and free sum to ``kv_pages_total``."""

    models: tuple[ModelStats, ...]
    kv_pages_total: int
    kv_pages_free: int
    kv_pages_cached: int
    page_bytes: int
    weights_pool_bytes: int
    weights_used_bytes: int
    spill_store_bytes: int = 0
    spill_used_bytes: int = 0

    @property
    def kv_pages_held(self) -> int:
        return self.kv_pages_total - self.kv_pages_free - self.kv_pages_cached


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far one model's weights have come. ``error`` says that it will not serve, and why.

    What is compiled before the first model can run reports the same way, in another ``unit``.
    """

    model: str
    done_bytes: int
    total_bytes: int
    error: str | None = None
    unit: str = "bytes"
