"""Logical CPU devices: their cores, their arenas, and the memory they report."""

from __future__ import annotations

import os
import threading

import psutil
import pytest
import torch

from crosspool.backends.cpu import make_cpu_backends
from crosspool.core.errors import ConfigError, OutOfMemoryError

pytestmark = pytest.mark.backend


@pytest.fixture
def eight_cores(monkeypatch):
    cores = (2, 3, 4, 5, 8, 9, 10, 11)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(cores))
    return cores


def cores_of(*numbers: int, threads: int | None = None) -> list[tuple[int, ...]]:
    backends = make_cpu_backends({f"cpu:{n}": n for n in numbers}, threads)
    assert [backend.name for backend in backends] == [f"cpu:{n}" for n in numbers]
    return [backend.cores for backend in backends]


def test_one_device_has_all_cores(eight_cores):
    assert cores_of(0) == [eight_cores]
    assert cores_of(3) == [eight_cores]


def test_devices_divide_the_cores(eight_cores):
    assert cores_of(0, 1) == [(2, 3, 4, 5), (8, 9, 10, 11)]
    assert cores_of(0, 1, 2) == [(2, 3), (4, 5), (8, 9)]
    assert cores_of(1, 0, threads=1) == [(3,), (2,)]


@pytest.mark.parametrize("leave", [False, True])
def test_a_computation_uses_its_share_and_leaves_a_core_of_it_if_asked(eight_cores, leave):
    def threads_of(*numbers: int, threads: int | None = None) -> list[int]:
        backends = make_cpu_backends({f"cpu:{n}": n for n in numbers}, threads, leave_a_core=leave)
        return [backend.threads for backend in backends]

    assert threads_of(0) == [8 - leave]
    assert threads_of(0, 1) == [4 - leave] * 2
    assert threads_of(*range(8)) == [1] * 8
    assert threads_of(0, threads=8) == [8]
    assert threads_of(0, 1, threads=2) == [2, 2]


def test_members_of_a_team_have_a_core_each(eight_cores, monkeypatch):
    bound = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: bound.append(set(cores)))
    backend, _ = make_cpu_backends({"cpu:0": 0, "cpu:1": 1}, None)
    for index in range(backend.threads + 1):
        backend.bind_member(index)
    assert bound == [{2}, {3}, {4}, {5}, {2}]


def test_more_devices_than_cores_share_them(eight_cores):
    assert cores_of(*range(10)) == [(eight_cores[n % 8],) for n in range(10)]


def test_more_threads_than_cores_is_refused(eight_cores):
    with pytest.raises(ConfigError, match=r"threads is 9.*8 cores"):
        cores_of(0, threads=9)


def test_a_bound_thread_runs_on_its_cores_only():
    first = min(os.sched_getaffinity(0))
    (backend,) = make_cpu_backends({"cpu:0": 0}, 1)
    assert backend.cores == (first,)
    seen = {}

    def work():
        backend.bind_thread()
        seen.update(cores=os.sched_getaffinity(0), threads=torch.get_num_threads())

    before = os.sched_getaffinity(0)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == {"cores": {first}, "threads": 1}
    assert os.sched_getaffinity(0) == before


def test_an_arena_is_zero_writable_and_lazy():
    (backend,) = make_cpu_backends({"cpu:0": 0}, None)
    process = psutil.Process()
    before = process.memory_info().rss
    arena = backend.new_arena(4096, 65536)  # 256 MiB
    assert arena.shape == (4096, 65536) and arena.dtype is torch.uint8
    assert process.memory_info().rss - before < 64 * 2**20
    arena[17] = 9
    assert arena[17].sum() == 9 * 65536 and arena[16].sum() == 0 and arena[4095].sum() == 0


def test_an_arena_beyond_the_address_space_is_refused_in_bytes():
    (backend,) = make_cpu_backends({"cpu:0": 0}, None)
    with pytest.raises(
        OutOfMemoryError, match=r"1,125,899,906,842,624 KV pages on cpu:0: .* bytes needed"
    ) as error:
        backend.new_arena(2**50, 4096)
    assert error.value.needed == 2**62
    assert 0 < error.value.free <= backend.total_bytes
