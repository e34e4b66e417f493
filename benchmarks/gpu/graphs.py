"""Section 2: what a graph of many small kernels costs: by node, and to make."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl

from gpu.device import Gpu
from gpu.results import Case, Figure, NotMeasured

NODES = 1000
ROUNDS = 200


@triton.jit
def step(counter):
    """The next number: a kernel of one program that depends on the one before."""
    tl.store(counter, tl.load(counter) + 1)


def chain(counter: torch.Tensor, nodes: int) -> None:
    for _ in range(nodes):
        step[(1,)](counter, num_warps=1)


def nodes(gpu: Gpu) -> list[Figure]:
    count = 3 if gpu.interpreted else NODES
    counter = gpu.device.tensor((1,), torch.int32)
    launches = partial(chain, counter, count)
    eager, graph = gpu.seconds(gpu.eager(launches)), gpu.seconds(gpu.recorded(launches))
    begin = time.perf_counter()
    gpu.eager(launches)()
    host = time.perf_counter() - begin
    gpu.device.finish()
    return [
        Figure("eager, a launch", 1e6 * eager / count, "us"),
        Figure("host's time of a launch", 1e6 * host / count, "us"),
        Figure("graph, a node", 1e6 * graph / count, "us"),
    ]


def short_graph(gpu: Gpu) -> list[Figure]:
    """The host's and the device's time of a replay of few nodes."""
    counter = gpu.device.tensor((1,), torch.int32)
    replay = gpu.recorded(partial(chain, counter, 1))
    rounds = 2 if gpu.interpreted else ROUNDS

    def many() -> None:
        for _ in range(rounds):
            replay()

    device = gpu.seconds(many) / rounds
    begin = time.perf_counter()
    many()
    host = (time.perf_counter() - begin) / rounds
    gpu.device.finish()
    return [
        Figure("a replay of one node", 1e6 * device, "us"),
        Figure("host's time of a replay", 1e6 * host, "us"),
    ]


def making(gpu: Gpu) -> list[Figure]:
    """Capture and instantiation, which a server does once for each pass it may launch."""
    if gpu.interpreted:
        raise NotMeasured("there are no graphs where kernels are interpreted")
    counter = gpu.device.tensor((1,), torch.int32)
    chain(counter, 1)
    gpu.device.finish()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    free = gpu.device.free_bytes
    begin = time.perf_counter()
    with torch.cuda.graph(graph, stream=gpu.stream, capture_error_mode="thread_local"):
        chain(counter, NODES)
    captured = time.perf_counter()
    graph.instantiate()
    made = time.perf_counter()
    graph.replay()
    gpu.device.finish()
    return [
        Figure("capture, a node", 1e6 * (captured - begin) / NODES, "us"),
        Figure("instantiation, a node", 1e6 * (made - captured) / NODES, "us"),
        Figure("first replay and upload", 1e6 * (time.perf_counter() - made), "us"),
        Figure("memory, a node", (free - gpu.device.free_bytes) / NODES, "bytes"),
    ]


@triton.jit
def begin(left, rounds):
    tl.store(left, rounds.to(tl.int64))


@triton.jit
def one_less(left):
    tl.store(left, tl.load(left) - 1)


def loop(gpu: Gpu) -> list[Figure]:
    """Rounds of one node, and of many; a loop that ends before its first; and what it takes to make one."""
    if not gpu.device.loops:
        raise NotMeasured(f"the device has no loops: {gpu.device.no_loops}")
    rounds, count, repeats = (3, 2, 1) if gpu.interpreted else (ROUNDS, NODES, 5)
    counter, left = gpu.device.tensor((1,), torch.int32), gpu.device.tensor((1,), torch.int64)

    def make(times: int, nodes: int) -> tuple[Callable[[], None], float]:
        """How to launch such a loop, and how long it took to make."""

        def body() -> None:
            chain(counter, nodes)
            one_less[(1,)](left, num_warps=1)

        start = time.perf_counter()
        made = gpu.device.loop(gpu.stream, lambda: begin[(1,)](left, times, num_warps=1), body, left)
        gpu.device.finish()
        return partial(gpu.device.replay, gpu.stream, made), time.perf_counter() - start

    short, empty = make(rounds, 0)[0], make(0, 0)[0]
    free = gpu.device.free_bytes
    long, took = make(rounds, count)
    taken = free - gpu.device.free_bytes
    before = int(counter)
    none, one, many = (gpu.seconds(launch, repeats) for launch in (empty, short, long))
    if (int(counter) - before) % (rounds * count) or int(left):
        raise RuntimeError(f"a loop of {rounds} rounds has made others")
    start = time.perf_counter()
    empty()
    host = time.perf_counter() - start
    gpu.device.finish()
    return [
        Figure("a round of one node", 1e6 * (one - none) / rounds, "us"),
        Figure("a round of many nodes, a node", 1e6 * many / rounds / (count + 1), "us"),
        Figure("a loop without rounds", 1e6 * none, "us"),
        Figure("host's time of a launch", 1e6 * host, "us"),
        Figure("making, a node", 1e6 * took / count, "us"),
        Figure("memory, a node", taken / count, "bytes"),
    ]


def cases(gpu: Gpu) -> list[Case]:
    runs = {
        "a chain of nodes": nodes,
        "a short graph": short_graph,
        "making a graph": making,
        "a WHILE node": loop,
    }
    return [Case(name, partial(run, gpu)) for name, run in runs.items()]
