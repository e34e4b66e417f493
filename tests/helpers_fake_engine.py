"""An engine without a model: it repeats the prompt, token by token, and holds pages while it does.

Run as a script it is a cell, for tests of what happens around one.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from crosspool.core.config import EngineConfig
from crosspool.core.errors import ConfigError, OverloadedError
from crosspool.core.ids import ModelIndex, RequestId
from crosspool.core.info import EngineInfo, EngineStats, LoadProgress, ModelInfo, ModelStats
from crosspool.core.request import EngineOutput, FinishReason, Request, TokenLogprobs
from crosspool.server.cell import main
from helpers_tiny_tokenizer import EOS_ID, VOCAB_SIZE

PAGES = 64
PAGE_BYTES = 4096
TOKENS_PER_PAGE = 16
MAX_CONTEXT = 900
MOST_RUNNING = 8
STEP_SECONDS = 0.005
PROMPT_TOKENS_PER_STEP = 4
BROKEN_FOLDER = "broken"
UNUSABLE_FOLDER = "unusable"
CRASHING_SEED = 666


@dataclass(slots=True)
class _Sequence:
    request: Request
    prefilled: int = 0
    made: int = 0

    @property
    def pages(self) -> int:
        return -(-(self.prefilled + self.made) // TOKENS_PER_PAGE)


class FakeEngine:
    """Keeps the Engine's contract with the clock of the wall. Every prompt token takes time, and so does
    every output token; a request with CRASHING_SEED breaks the engine."""

    def __init__(self, config: EngineConfig) -> None:
        models = tuple(_model(i, model.name, model.path) for i, model in enumerate(config.models))
        self.info = EngineInfo(
            models=models,
            kv_devices=config.kv_devices,
            weights_devices=config.weights_devices,
            page_bytes=PAGE_BYTES,
            kv_pages=PAGES,
            kv_pool_bytes=PAGES * PAGE_BYTES,
            weights_pool_bytes=1000,
            weights_used_bytes=600,
        )
        self._sequences: dict[RequestId, _Sequence] = {}
        self._outputs: list[EngineOutput] = []
        self._next_step = 0.0
        self._woken = threading.Event()
        self._finished = {model.name: dict.fromkeys(map(str, FinishReason), 0) for model in models}
        self._seen: set[tuple[int, bytes, tuple[int, ...]]] = set()
        self.aborted: list[RequestId] = []

    def add(self, request: Request) -> None:
        model = self.info.models[request.model]
        model.check_serves()
        if request.seed == CRASHING_SEED:
            raise RuntimeError("the fake engine was asked to crash at /secret/path")
        if len(self._sequences) >= MOST_RUNNING:
            raise OverloadedError("the queue is full")
        self._sequences[request.id] = _Sequence(request)

    def finish(self, request: RequestId, at_token: int) -> None:
        if request in self._sequences:
            self._end(request, FinishReason.STOP)

    def abort(self, request: RequestId) -> None:
        if request in self._sequences:
            self.aborted.append(request)
            self._end(request, FinishReason.ABORT)

    def stream_to(self, pipe: int) -> None:
        """All tokens come from ``take``."""

    def take(self) -> list[EngineOutput]:
        return self.step()

    def decide(self) -> None: ...

    def step(self) -> list[EngineOutput]:
        now = time.monotonic()
        if now >= self._next_step:
            self._next_step = now + STEP_SECONDS
            for sequence in list(self._sequences.values()):
                self._advance(sequence)
        outputs, self._outputs = self._outputs, []
        return outputs

    def wait(self, timeout: float) -> None:
        if self._sequences:
            timeout = max(0.0, min(timeout, self._next_step - time.monotonic()))
        self._woken.wait(timeout)
        self._woken.clear()

    def wake(self) -> None:
        self._woken.set()

    def stats(self) -> EngineStats:
        return EngineStats(
            models=tuple(self._model_stats(model) for model in self.info.models),
            kv_pages_total=PAGES,
            kv_pages_free=PAGES - sum(sequence.pages for sequence in self._sequences.values()),
            kv_pages_cached=0,
            page_bytes=PAGE_BYTES,
            weights_pool_bytes=1000,
            weights_used_bytes=600,
        )

    def close(self) -> None:
        pass

    def _advance(self, sequence: _Sequence) -> None:
        request, prompt = sequence.request, sequence.request.prompt_token_ids
        if sequence.prefilled < len(prompt):
            sequence.prefilled = min(len(prompt), sequence.prefilled + PROMPT_TOKENS_PER_STEP)
            return
        token = prompt[sequence.made % len(prompt)]
        sequence.made += 1
        finish = None
        if token in request.stop_token_ids and sequence.made > request.sampling.min_tokens:
            finish = FinishReason.STOP
        elif sequence.made == request.max_tokens:
            finish = FinishReason.LENGTH
        count = request.sampling.logprobs
        logprobs = () if count is None else (_logprobs(token, count),)
        cached = self._note_prompt(request) if sequence.made == 1 else 0
        self._outputs.append(EngineOutput(request.id, (token,), logprobs, finish, cached_tokens=cached))
        if finish is not None:
            self._count(self._sequences.pop(request.id), finish)

    def _note_prompt(self, request: Request) -> int:
        """How many of its tokens are cached: all but the last, if its tenant has had the same prompt."""
        prompt = (request.model, request.tenant, request.prompt_token_ids)
        cached = len(request.prompt_token_ids) - 1 if prompt in self._seen else 0
        self._seen.add(prompt)
        return cached

    def _end(self, request: RequestId, reason: FinishReason) -> None:
        self._count(self._sequences.pop(request), reason)
        self._outputs.append(EngineOutput(request, (), finish_reason=reason))

    def _count(self, sequence: _Sequence, reason: FinishReason) -> None:
        self._finished[self.info.models[sequence.request.model].name][reason] += 1

    def _model_stats(self, model: ModelInfo) -> ModelStats:
        mine = [s for s in self._sequences.values() if s.request.model == model.index]
        return ModelStats(
            name=model.name,
            running=len(mine),
            kv_pages_held=sum(sequence.pages for sequence in mine),
            finished=self._finished[model.name],
        )


def build_fake_engine(config: EngineConfig, progress: Callable[[LoadProgress], None]) -> FakeEngine:
    """Models whose folder is called BROKEN_FOLDER fail alone; UNUSABLE_FOLDER fails everything."""
    if any(model.path.endswith(UNUSABLE_FOLDER) for model in config.models):
        raise ConfigError("the pools do not fit")
    for update in _progress(config):
        progress(update)
    return FakeEngine(config)


def _progress(config: EngineConfig) -> Iterator[LoadProgress]:
    for i, model in enumerate(config.models):
        yield LoadProgress(model.name, 0, 100)
        yield LoadProgress(model.name, 100, 100, _model(i, model.name, model.path).error)


def _model(index: int, name: str, path: str) -> ModelInfo:
    if path.endswith(BROKEN_FOLDER):
        return ModelInfo(name, ModelIndex(index), path, error="model.safetensors is truncated")
    return ModelInfo(
        name,
        ModelIndex(index),
        path,
        architecture="FakeForCausalLM",
        dtype="float32",
        vocab_size=VOCAB_SIZE,
        max_context=MAX_CONTEXT,
        max_pool_tokens=PAGES * TOKENS_PER_PAGE,
        eos_token_ids=(EOS_ID,),
        tokens_per_page=TOKENS_PER_PAGE,
    )


def _logprobs(token: int, count: int) -> TokenLogprobs:
    """The token first, then its successors, each half as probable."""
    top = tuple(((token + i) % VOCAB_SIZE, -0.5 - 0.7 * i) for i in range(count))
    return TokenLogprobs(-0.5, 1, top)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    sys.exit(main(build_fake_engine))
