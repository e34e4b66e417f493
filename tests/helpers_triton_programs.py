"""Programs of one launch beside each other, where kernels are interpreted: the interpreter runs them one
after another, so that one that waits for another would wait forever.

Here each program is a process of its own, forked, so that addresses mean the same in all of them, over
tensors in shared memory. Atomics of the interpreter are those of the CPU on raw addresses, so they hold
between processes. Delays come in before atomics, where a program may be overtaken.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkProcess
from typing import Any

import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

import helpers_triton  # noqa: F401
from crosspool.kernels.triton.ffn_queue import NEWS_WORDS, FfnQueue, launches_asked_for, queue_words

SECONDS = 40.0
"""After which everything that still runs is ended, and the test has failed."""

LOOK = 0.0001
"""Seconds between two looks at a word."""


def shared(made: Any) -> Any:
    """A tensor, or a tuple with tensors, in memory that forked processes share."""
    if isinstance(made, Tensor):
        return made.clone().share_memory_() if made.numel() else made
    if isinstance(made, tuple):
        parts = [shared(part) for part in made]
        return type(made)(*parts) if hasattr(made, "_fields") else tuple(parts)
    return made


def shared_queue(slots: int, programs: int, patience: int = 30, most_looks: int = 1_000_000) -> FfnQueue:
    words = torch.zeros(queue_words(slots), dtype=torch.int64)
    return shared(
        FfnQueue(words, torch.zeros(NEWS_WORDS, dtype=torch.int64), slots, programs, patience, most_looks)
    )


class Crew:
    """The processes of a queue's programs. ``serve`` launches its kernel, of which each process is one
    program; a launch begins when all programs have ended the one before, as in a stream. ``absent`` ones
    never begin."""

    def __init__(
        self,
        queue: FfnQueue,
        serve: Callable[[int], None],
        *,
        delay: float = 0.0,
        seed: int = 0,
        absent: Sequence[int] = (),
    ) -> None:
        self._queue, self._serve, self._delay, self._seed = queue, serve, delay, seed
        self._present = [program for program in range(queue.programs) if program not in absent]
        self._launched = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._ended = torch.zeros(queue.programs, dtype=torch.int64).share_memory_()
        self._over = torch.zeros(1, dtype=torch.int64).share_memory_()

    def run(self, askers: Sequence[Callable[[], None]]) -> int:
        """Run all ``askers``, each in a process, and be the host that launches when somebody asks for it.
        Returns how many launches there were. Fails if a process has failed, or did not end in time."""
        programs = [_fork(self._program, number) for number in self._present]
        asking = [_fork(self._asker, number, asker) for number, asker in enumerate(askers)]
        end = time.monotonic() + SECONDS
        try:
            while any(one.is_alive() for one in asking) and time.monotonic() < end:
                self._launch()
                time.sleep(0.0002)
            self._over[0] = 1
            for one in (*asking, *programs):
                one.join(max(end - time.monotonic(), 0))
                assert one.exitcode == 0, f"{one.name} has ended with {one.exitcode}"
        finally:
            for one in (*asking, *programs):
                one.kill()
                one.join()
        return int(self._launched)

    def _launch(self) -> None:
        try:
            self._launched += launches_asked_for(self._queue, int(self._launched))
        except RuntimeError:
            return

    def _program(self, number: int) -> None:
        _be_program(number, self._queue.programs)
        _delay_atomics(self._delay, 1000 * self._seed + number)
        launch = 1
        while True:
            while not self._begins(launch):
                if self._over.item():
                    return
                time.sleep(0.0001)
            self._serve(launch)
            self._ended[number] = launch
            launch += 1

    def _begins(self, launch: int) -> bool:
        return int(self._launched) >= launch and bool(self._ended[self._present].ge(launch - 1).all())

    def _asker(self, number: int, asker: Callable[[], None]) -> None:
        _delay_atomics(self._delay, 1000 * self._seed + 500 + number)
        asker()


def _fork(target: Callable[..., None], *arguments: Any) -> ForkProcess:
    process = get_context("fork").Process(target=_child, args=(target, *arguments), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Of a fork where there are threads.
        process.start()
    return process


def _child(target: Callable[..., None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    _prepare_once()
    target(*arguments)


def _prepare_once() -> None:
    """The interpreter prepares Triton's language whenever a function calls another, which takes longer than
    all else: here it does so once for each function of a launch."""
    patch_lang, launch = interpreter._patch_lang, GridExecutor.__call__
    prepared: dict[Any, Any] = {}

    def prepare(function: Any) -> Any:
        if function not in prepared:
            prepared[function] = patch_lang(function)
        return prepared[function]

    def launched(self: Any, *arguments: Any, **options: Any) -> None:
        prepared.clear()
        launch(self, *arguments, **options)

    interpreter._patch_lang = prepare
    GridExecutor.__call__ = launched  # type: ignore[method-assign]


def _be_program(number: int, programs: int) -> None:
    """In this process, launches of several programs are one of them."""
    builder, launch = interpreter.interpreter_builder, GridExecutor.__call__
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def alone(self: Any, *arguments: Any, **options: Any) -> None:
        self.grid = (1,)
        launch(self, *arguments, **options)

    builder.set_grid_dim = lambda *_: set_dim(programs, 1, 1)
    builder.set_grid_idx = lambda *_: set_index(number, 0, 0)
    GridExecutor.__call__ = alone  # type: ignore[method-assign]


def _delay_atomics(longest: float, seed: int) -> None:
    """Sometimes, by up to so many seconds. Whoever looks at a word leaves the core to others for a while:
    there may be fewer cores than processes."""
    builder, chance = interpreter.InterpreterBuilder, random.Random(seed)
    atomic, swap = builder.create_atomic_rmw, builder.create_atomic_cas

    def delayed(operation: Callable[..., Any], value: int) -> Callable[..., Any]:
        def late(self: Any, *arguments: Any) -> Any:
            if longest and chance.random() < 0.02:
                time.sleep(longest * chance.random())
            elif not arguments[value].data.any():
                time.sleep(LOOK)
            return operation(self, *arguments)

        return late

    builder.create_atomic_rmw, builder.create_atomic_cas = delayed(atomic, 2), delayed(swap, 2)
