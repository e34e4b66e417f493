"""A world for the control plane: the real engine over the simulator's executor, with KV pages that remember.

``ShadowModel`` keeps what was written into every page and computes each next token from what it reads back
there. So a page lent twice, freed too early, recomputed wrongly, copied wrongly or trimmed too far changes
the output or fails at once; and the expected output of every request is known without the engine.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from zlib import crc32

from crosspool.build.control import assemble
from crosspool.build.pool_plan import PoolPlan, choose_homes
from crosspool.core.batch import Event, Grant, RetiredEvent, Row
from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from crosspool.core.copies import CopiedEvent, Direction, PageCopy
from crosspool.core.device_pages import DevicePages
from crosspool.core.ids import NULL_PAGE, ModelIndex, Nanoseconds, RequestId
from crosspool.core.in_flight import LayerTask
from crosspool.core.info import ModelInfo
from crosspool.core.kv_layout import KvLayout, make_layout
from crosspool.core.request import EngineOutput, FinishReason, Request
from crosspool.core.sampling import SamplingParams
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Sharding
from crosspool.costs.layer import HardwareProfile
from crosspool.engine.engine import Engine
from crosspool.pools.ffn import FfnPool
from crosspool.pools.quotas import Quota
from crosspool.scheduler.sequence import State
from crosspool.sim.clock import VirtualClock
from crosspool.sim.executor import SimExecutor
from helpers_specs import gqa_spec, mla_spec

MILLISECOND = 1_000_000


def token_after(model: ModelIndex, layout: KvLayout, tokens: tuple[int, ...], vocab: int) -> int:
    """The token that follows ``tokens``: a hash of what each layer group can see."""
    seen = []
    for group in layout.groups:
        first = 0 if group.window is None else max(0, len(tokens) - group.window)
        seen.append(tokens[first:])
    return crc32(repr((model, seen)).encode()) % vocab


class ShadowModel:
    """A TokenModel whose arithmetic reads the pages."""

    def __init__(
        self,
        specs: Mapping[ModelIndex, ModelSpec],
        layouts: Mapping[ModelIndex, KvLayout],
        places: DevicePages,
    ) -> None:
        self._specs = specs
        self._layouts = layouts
        self._places = places
        self._pages: dict[int, dict[int, tuple[int, int, int, int]]] = {}
        self._host_pages: dict[int, dict[int, tuple[int, int, int, int]]] = {}
        self._length: dict[tuple[int, RequestId], int] = {}

    def begin_pass(self, grant: Grant, row: Row, start: int, tokens: tuple[int, ...]) -> None:
        layout = self._layouts[grant.model]
        for group, pages in enumerate(row.pages):
            devices = {self._places.device_of(page) for page in pages if page != NULL_PAGE}
            assert devices <= {grant.kv_device, *grant.elsewhere}, f"{devices} for {grant}"
            for offset, token in enumerate(tokens):
                chunk, slot = divmod(start + offset, layout.tokens_per_page)
                page = pages[chunk]
                assert page != NULL_PAGE, f"request {row.request} writes position {start + offset} nowhere"
                content = self._pages.setdefault(page, {})
                content[slot] = (grant.model, group, start + offset, token)
        self._length[grant.id, row.request] = start + len(tokens)

    def next_token(self, grant: Grant, row: Row, output_index: int) -> int:
        layout, length = self._layouts[grant.model], self._length[grant.id, row.request]
        seen = []
        for group, pages in enumerate(row.pages):
            window = layout.groups[group].window
            first = 0 if window is None else max(0, length - window)
            tokens = []
            for position in range(first, length):
                chunk, slot = divmod(position, layout.tokens_per_page)
                where = self._pages[pages[chunk]][slot]
                assert where[:3] == (grant.model, group, position), (
                    f"request {row.request} reads {where} at position {position} of group {group}"
                )
                tokens.append(where[3])
            seen.append(tuple(tokens))
        return crc32(repr((grant.model, seen)).encode()) % self._specs[grant.model].vocab_size

    def begin_copy(self, copy: PageCopy) -> None:
        """What is being written has no content until the copy is over."""
        for source, _, target, to in self._pairs(copy):
            assert source is not target
            target.pop(to, None)

    def end_copy(self, copy: PageCopy) -> None:
        """What is in the source now is what was copied: it may have been read as late as this."""
        for source, at, target, to in self._pairs(copy):
            target[to] = dict(source.get(at, {}))

    def _pairs(self, copy: PageCopy):
        """(where from, which page there, where to, which page there) of each page."""
        for page, host_page in zip(copy.pages, copy.host_pages, strict=True):
            if copy.direction is Direction.OUT:
                yield self._pages, page, self._host_pages, host_page
            else:
                yield self._host_pages, host_page, self._pages, page


class FailingExecutor(SimExecutor):
    """Makes some grants and copies fail at their end, as a layer task that raises would."""

    def __init__(self, *args: object, fails: Callable[[], bool], **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self._fails = fails
        self.failures = 0

    def copy(self, copy: PageCopy) -> None:
        self._tokens.begin_copy(copy)  # type: ignore[attr-defined]
        super().copy(copy)

    def _end_copy(self) -> PageCopy:
        copy = super()._end_copy()
        self._tokens.end_copy(copy)  # type: ignore[attr-defined]
        return copy

    def poll(self) -> list[Event]:
        events = super().poll()
        for index, event in enumerate(events):
            if isinstance(event, RetiredEvent) and self._fails():
                self.failures += 1
                events[index] = RetiredEvent(event.grant, event.layer_times, "the layer failed")
            if isinstance(event, CopiedEvent) and self._fails():
                self.failures += 1
                events[index] = event._replace(time=Nanoseconds(0), error="the copy failed")
        return events


@dataclass
class World:
    """One engine in virtual time, and what it said of each request."""

    engine: Engine
    executor: SimExecutor
    clock: VirtualClock
    config: EngineConfig
    specs: dict[ModelIndex, ModelSpec]
    layouts: dict[ModelIndex, KvLayout]
    requests: dict[RequestId, Request] = field(default_factory=dict)
    outputs: dict[RequestId, list[int]] = field(default_factory=dict)
    token_times: dict[RequestId, list[int]] = field(default_factory=dict)
    finished: dict[RequestId, FinishReason] = field(default_factory=dict)

    def add(self, request: Request) -> None:
        self.engine.add(request)
        self.requests[request.id] = request
        self.outputs[request.id] = []
        self.token_times[request.id] = []

    def step(self) -> list[EngineOutput]:
        outputs = self.engine.step()
        for output in outputs:
            assert output.request not in self.finished, f"request {output.request} speaks after its end"
            self.outputs[output.request].extend(output.token_ids)
            self.token_times[output.request].extend([self.clock.now()] * len(output.token_ids))
            if output.finish_reason is not None:
                self.finished[output.request] = output.finish_reason
        return outputs

    def run(self, limit: int = 1_000_000) -> None:
        """Until everything has ended."""
        for _ in range(limit):
            self.step()
            if not self.executor.advance() and not self.engine.has_work():
                return
        raise AssertionError(f"{len(self.requests) - len(self.finished)} requests never ended")

    def state(self, request: RequestId) -> State | None:
        sequence = self.engine._scheduler.get(request)
        return None if sequence is None else sequence.state

    def expected(self, request: Request) -> list[int]:
        """The output of a request that nobody interrupts."""
        tokens, output = request.prompt_token_ids, []
        vocab = self.specs[request.model].vocab_size
        while len(output) < request.max_tokens:
            token = token_after(request.model, self.layouts[request.model], (*tokens, *output), vocab)
            output.append(token)
            if token in request.stop_token_ids and len(output) > request.sampling.min_tokens:
                break
        return output


def make_world(
    specs: list[ModelSpec],
    *,
    page_bytes: int,
    pages: int,
    scheduler: SchedulerConfig | None = None,
    kv_devices: tuple[str, ...] = ("cpu:0",),
    weights_devices: tuple[str, ...] = ("cpu:0",),
    sharding: Sharding = Sharding.LAYER,
    prefix_cache: bool = True,
    profile: HardwareProfile | None = None,
    speed: Callable[[], float] = lambda: 1.0,
    fails: Callable[[], bool] = lambda: False,
    watch: Callable[[LayerTask, int, int], None] | None = None,
    quotas: list[Quota] | None = None,
    spill_pages: int = 0,
) -> World:
    """An engine over these models with ``pages`` pages on each KV device. ``quotas`` are in pages."""
    by_index = {ModelIndex(index): spec for index, spec in enumerate(specs)}
    config = EngineConfig(
        models=tuple(
            _model_config(index, quota, page_bytes)
            for index, quota in enumerate(quotas or [Quota()] * len(specs))
        ),
        pools=PoolConfig(prefix_cache=prefix_cache),
        scheduler=scheduler or SchedulerConfig(),
        kv_devices=kv_devices,
        weights_devices=weights_devices,
        sharding=sharding,
    )
    layouts = {index: make_layout(spec, page_bytes) for index, spec in by_index.items()}
    ffn_bytes = sum(spec.total_ffn_bytes for spec in specs)
    places = DevicePages.of([pages] * len(kv_devices))
    homes = choose_homes(config.topology, by_index)
    plan = PoolPlan(page_bytes, places, ffn_bytes, layouts, homes, spill_pages)
    ffn_pool = FfnPool(ffn_bytes)
    for index, spec in by_index.items():
        ffn_pool.begin_load(index, f"model-{index}", [spec.total_ffn_bytes])
        ffn_pool.finish_load(index, pinned=False)
    clock = VirtualClock()
    profile = profile or HardwareProfile(task_overhead=Nanoseconds(10_000))
    executor = FailingExecutor(
        config.topology,
        by_index,
        clock,
        ShadowModel(by_index, layouts, places),
        profile,
        speed=speed,
        watch=watch,
        fails=fails,
    )
    models = [
        ModelInfo(model.name, index, model.path) for index, model in zip(by_index, config.models, strict=True)
    ]
    engine = assemble(config, models, by_index, plan, ffn_pool, executor, clock, profile)
    return World(engine, executor, clock, config, by_index, layouts)


def _model_config(index: int, quota: Quota, page_bytes: int) -> ModelConfig:
    cap = None if quota.cap is None else quota.cap * page_bytes
    return ModelConfig(f"model-{index}", "nowhere", kv_floor_bytes=quota.floor * page_bytes, kv_cap_bytes=cap)


def make_request(
    identity: int,
    prompt: tuple[int, ...],
    max_tokens: int,
    *,
    model: int = 0,
    stop: frozenset[int] = frozenset(),
    min_tokens: int = 0,
    tenant: bytes = b"",
) -> Request:
    return Request(
        id=RequestId(identity),
        model=ModelIndex(model),
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens),
        max_tokens=max_tokens,
        seed=identity,
        stop_token_ids=stop,
        arrival=Nanoseconds(0),
        tenant=tenant,
    )


# -- one random life ----------------------------------------------------------------------------------------


@dataclass
class Life:
    """What one seed did: for the counts that show the tests went everywhere."""

    decisions: int
    preemptions: int
    aborted_in_prefill: int
    failures: int
    spread: int
    cached_tokens: int
    evicted_pages: int
    spilled: int
    returned: int
    cancelled_copies: int
    requests: int
    moves: Counter[tuple[State, State]]


def check_writes_nothing_shared(world: World, grant: Grant) -> None:
    """No row writes into a page that the prefix cache may lend to others."""
    size = world.layouts[grant.model].tokens_per_page
    cached = {page for chunk in world.engine._pool._cache.chunks() for page in chunk.pages}
    for row in grant.rows:
        last = row.start + len(row.tokens) + max(0, row.steps - 1) - 1
        for pages in row.pages:
            written = pages[row.start // size : last // size + 1]
            assert not cached.intersection(written), f"request {row.request} writes into shared pages"


def random_specs(rng: random.Random) -> list[ModelSpec]:
    specs = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.randrange(3)
        if kind == 0:
            specs.append(gqa_spec(layers=rng.randint(1, 5), kv_heads=rng.choice((1, 3))))
        elif kind == 1:
            windows = tuple(rng.choice((None, 20, 33)) for _ in range(rng.randint(2, 5)))
            specs.append(gqa_spec(windows=windows))
        else:
            specs.append(mla_spec(layers=rng.randint(2, 4), latent=rng.choice((12, 20))))
    return specs


TOPOLOGIES = (
    (("cpu:0",), ("cpu:0",), Sharding.LAYER),
    (("cpu:0",), ("cpu:1",), Sharding.LAYER),
    (("cpu:0", "cpu:1"), ("cpu:0", "cpu:1"), Sharding.LAYER),
    (("cpu:0",), ("cpu:1", "cpu:2", "cpu:3"), Sharding.TENSOR),
    (("cpu:0", "cpu:1"), ("cpu:2",), Sharding.TENSOR),
    (("cpu:0", "cpu:1", "cpu:2"), ("cpu:1", "cpu:0"), Sharding.TENSOR),
    (("cpu:0", "cpu:1"), ("cpu:0", "cpu:1"), Sharding.MODEL),
)


def live(seed: int) -> Life:
    """Arrivals, aborts, early finishes and failures over a tiny pool; raises where a promise is broken."""
    rng = random.Random(seed)
    specs = random_specs(rng)
    kv_devices, weights_devices, sharding = rng.choice(TOPOLOGIES)
    quantum = rng.choice((1, 2, 4, 8, 16))
    scheduler = SchedulerConfig(
        chunk_quantum=quantum,
        max_chunk_tokens=quantum * rng.choice((1, 1, 1, 2, 4)),
        max_batch_rows=rng.choice((1, 2, 4, 8)),
        max_prefill_rows=rng.choice((1, 1, 4)),
        decode_steps=rng.choice((1, 2, 3, 5, 32)),
        turn_steps=rng.randint(1, 4),
        ttft_target=Nanoseconds(rng.choice((1, 20, 500)) * MILLISECOND),
        tbt_target=Nanoseconds(rng.choice((1, 10, 100)) * MILLISECOND),
        outgrowth_risk=rng.choice((1.0, 1.0, 1.0, 0.5, 0.01)),
    )
    page_bytes = max(16 * spec.kv_bytes_per_token_layer for spec in specs) * rng.choice((1, 2))
    longest = rng.randint(60, 200)
    shared_by = 1 if sharding is Sharding.MODEL else len(kv_devices)
    quotas, pages = _tight_pool(specs, page_bytes, longest, rng)
    world = make_world(
        specs,
        page_bytes=page_bytes,
        pages=-(-pages // shared_by),
        quotas=quotas,
        scheduler=scheduler,
        kv_devices=kv_devices,
        weights_devices=weights_devices,
        sharding=sharding,
        prefix_cache=rng.random() < 0.9,
        profile=HardwareProfile(
            rng.choice((1e8, 1e9, 1e11)),
            task_overhead=Nanoseconds(10_000),
            copy_bytes_per_second=rng.choice((1e7, 1e8, 1e9)),
        ),
        spill_pages=rng.choice((0, rng.randint(1, pages), 4 * pages)),
        speed=lambda: rng.uniform(0.3, 3.0),
        fails=(lambda: rng.random() < 0.01) if rng.random() < 0.2 else (lambda: False),
    )
    return _Story(world, rng, longest).tell()


def _tight_pool(
    specs: list[ModelSpec], page_bytes: int, longest: int, rng: random.Random
) -> tuple[list[Quota], int]:
    """Pages for the longest request of any model beside the floors of the others, and a little more."""
    needs = [make_layout(spec, page_bytes).pages(longest) for spec in specs]
    quotas = [Quota()] * len(specs)
    if rng.random() < 0.25:
        quotas = [Quota(share, share) for need in needs for share in (need + rng.randint(0, need // 2),)]
    elif rng.random() < 0.35:
        quotas = [
            Quota(rng.choice((0, 1, rng.randint(0, need))), rng.choice((None, need + rng.randint(0, need))))
            for need in needs
        ]
    floors = sum(quota.floor for quota in quotas)
    least = max(need + floors - quota.floor for need, quota in zip(needs, quotas, strict=True))
    return quotas, max(least, floors) + rng.randint(0, max(needs) // 2)


class _Story:
    """Random events against one world, and the promises checked at every step."""

    def __init__(self, world: World, rng: random.Random, longest: int) -> None:
        self.world = world
        self.rng = rng
        self.arrivals = self._make_arrivals(longest)
        self.cut: dict[RequestId, int] = {}
        self.aborted: set[RequestId] = set()
        self.aborted_in_prefill = 0
        self.cancelled_copies = 0
        self.decisions = 0
        self.spread = 0

    def _make_arrivals(self, longest: int) -> list[tuple[int, Request]]:
        rng, time, arrivals = self.rng, 0, []
        burst = rng.choice((0, 1, 5)) * MILLISECOND
        readers_and_writers = rng.random() < 0.4
        for identity in range(rng.randint(10, 24)):
            total = rng.randint(2, longest) if rng.random() < 0.3 else rng.randint(longest // 2, longest)
            prompt = rng.choice((1, 16, rng.randint(1, 20), rng.randint(1, total), 3 * total // 4))
            if readers_and_writers:
                total, prompt = longest, rng.choice((1, longest // 2, longest - 10))
            prompt = min(prompt, total - 1)
            model = rng.randrange(len(self.world.specs))
            stop = frozenset(rng.sample(range(97), 2)) if rng.random() < 0.2 else frozenset()
            most = total - prompt
            request = make_request(
                identity,
                self._make_prompt(model, prompt, [earlier for _, earlier in arrivals]),
                most,
                model=model,
                stop=stop,
                min_tokens=rng.randint(0, most) if rng.random() < 0.2 else 0,
                tenant=b"other" if rng.random() < 0.2 else b"",
            )
            time += rng.randint(0, burst)
            arrivals.append((time, request))
        return arrivals

    def _make_prompt(self, model: int, length: int, earlier: list[Request]) -> tuple[int, ...]:
        """New tokens, after the beginning of an earlier request and perhaps of its answer, or all of them."""
        rng, beginning = self.rng, ()
        known = [request for request in earlier if request.model == model]
        if known and rng.random() < 0.8:
            request = rng.choice(known)
            beginning = (*request.prompt_token_ids, *self.world.expected(request))
            if rng.random() < 0.5:
                beginning = beginning[: rng.randint(0, len(beginning))]
        return (*beginning, *(rng.randrange(97) for _ in range(length)))[:length]

    def tell(self) -> Life:
        world = self.world
        submit = world.executor.submit

        def counted(grant: Grant) -> None:
            self.decisions += 1
            self.spread += bool(grant.elsewhere)
            check_writes_nothing_shared(world, grant)
            submit(grant)

        world.executor.submit = counted  # type: ignore[method-assign]
        for _ in range(200_000):
            self._arrive()
            world.step()
            world.engine.check()
            self._meddle()
            self._meddle_with_copies()
            if not self._pass_time():
                break
        else:
            raise AssertionError(f"{len(world.requests) - len(world.finished)} requests never ended")
        self._check_end()
        scheduler = world.engine._scheduler
        return Life(
            decisions=self.decisions,
            preemptions=scheduler.preemptions.total(),
            aborted_in_prefill=self.aborted_in_prefill,
            failures=world.executor.failures,  # type: ignore[attr-defined]
            spread=self.spread,
            cached_tokens=sum(model.cached_tokens for model in world.engine.stats().models),
            evicted_pages=sum(model.cached_pages_evicted for model in world.engine.stats().models),
            spilled=sum(model.spilled_sequences for model in world.engine.stats().models),
            returned=sum(model.returned_sequences for model in world.engine.stats().models),
            cancelled_copies=self.cancelled_copies,
            requests=len(world.requests),
            moves=scheduler.moves,
        )

    def _arrive(self) -> None:
        while self.arrivals and self.arrivals[0][0] <= self.world.clock.now():
            self.world.add(self.arrivals.pop(0)[1])

    def _pass_time(self) -> bool:
        """To the next arrival or task end, whichever is first. False when nothing is left to happen."""
        world, limit = self.world, self.arrivals[0][0] if self.arrivals else None
        for _ in range(self.rng.randint(1, 3)):
            if not world.executor.advance(limit):
                break
        else:
            return True
        if limit is not None and (world.executor.next_end is None or world.executor.next_end > limit):
            world.clock.advance_to(limit)
            return True
        return world.executor.next_end is not None or world.engine.has_work()

    def _meddle(self) -> None:
        """Now and then somebody disconnects, or a stop string is found."""
        world, rng = self.world, self.rng
        open_requests = [request for request in world.requests if request not in world.finished]
        if not open_requests or rng.random() > 0.006:
            return
        request = rng.choice(open_requests)
        if rng.random() < 0.5:
            prefilling = [r for r in open_requests if world.state(r) is State.PREFILLING]
            if prefilling:
                request = rng.choice(prefilling)
                self.aborted_in_prefill += 1
            world.engine.abort(request)
            self.aborted.add(request)
        elif world.outputs[request]:
            self.cut[request] = rng.randint(1, len(world.outputs[request]))
            world.engine.finish(request, self.cut[request])

    def _meddle_with_copies(self) -> None:
        """A client disconnects while its request's pages are being copied."""
        copying = [r for r in self.world.requests if self.world.state(r) in (State.SPILLING, State.RETURNING)]
        if copying and self.rng.random() < 0.05:
            request = self.rng.choice(copying)
            if request not in self.world.finished:
                self.world.engine.abort(request)
                self.aborted.add(request)
                self.cancelled_copies += 1

    def _check_end(self) -> None:
        world = self.world
        assert set(world.finished) == set(world.requests)
        assert world.engine.stats().kv_pages_held == 0
        assert world.engine.stats().spill_used_bytes == 0
        for identity, request in world.requests.items():
            expected, output, reason = (
                world.expected(request),
                world.outputs[identity],
                world.finished[identity],
            )
            assert output == expected[: len(output)], f"request {identity}: {output} instead of {expected}"
            if reason in (FinishReason.ABORT, FinishReason.ERROR) or identity in self.cut:
                continue
            assert output == expected, f"request {identity} ended early: {output} of {expected}"
            stopped = output[-1] in request.stop_token_ids and len(output) > request.sampling.min_tokens
            assert reason is (FinishReason.STOP if stopped else FinishReason.LENGTH)
