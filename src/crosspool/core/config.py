"""Frozen configuration. Each component is given its own slice and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from crosspool.core.errors import ConfigError
from crosspool.core.ids import Nanoseconds
from crosspool.core.topology import Sharding, Topology

MILLISECOND = 1_000_000
SECOND = 1_000_000_000
WEIGHTS_DTYPES = ("auto", "int8", "float8")
MOST_DECODE_STEPS = 4096
"""The stages of all passes of a grant are numbered in 24 bits (workers/resident/control.py)."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model to serve: the name that clients use and the folder that holds the checkpoint.

    ``dtype`` is "auto" (as stored), "float32", "bfloat16" or "float16". ``weights_dtype`` is "auto" (as
    ``dtype``, but FFNs that are stored in float8 stay so on GPUs) or what matrices become while they load:
    "int8" (CPU devices: projections, experts and LM head) or "float8" (GPUs: FFNs). ``ttft_target`` and
    ``tbt_target`` override the scheduler's for this model. ``pinned`` weights are never evicted.

    Of the KV pool, ``kv_floor_bytes`` are kept for this model, and it holds ``kv_cap_bytes`` at most (None:
    all that the others' floors leave); both count whole pages, over all devices.
    """

    name: str
    path: str
    dtype: str = "auto"
    weights_dtype: str = "auto"
    pinned: bool = False
    ttft_target: Nanoseconds | None = None
    tbt_target: Nanoseconds | None = None
    kv_floor_bytes: int = 0
    kv_cap_bytes: int | None = None

    def __post_init__(self) -> None:
        if not self.name or len(self.name) > 200 or any(c.isspace() for c in self.name):
            raise ConfigError(f"a model's name must be 1 to 200 characters without spaces, not {self.name!r}")
        for field_name in ("ttft_target", "tbt_target"):
            target = getattr(self, field_name)
            if target is not None and target < 1:
                raise ConfigError(f"model {self.name}: {field_name} must be above 0, not {target}")
        if self.kv_floor_bytes < 0:
            raise ConfigError(f"model {self.name}: kv_floor_bytes must not be below 0: {self.kv_floor_bytes}")
        if self.kv_cap_bytes is not None and self.kv_cap_bytes < max(1, self.kv_floor_bytes):
            raise ConfigError(
                f"model {self.name}: kv_cap_bytes {self.kv_cap_bytes:,} must be above 0, and not below "
                f"kv_floor_bytes {self.kv_floor_bytes:,}"
            )
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(
                f"model {self.name}: dtype must be auto, float32, bfloat16 or float16, not {self.dtype!r}"
            )
        if self.weights_dtype not in WEIGHTS_DTYPES:
            raise ConfigError(
                f"model {self.name}: weights_dtype must be auto, int8 or float8, not {self.weights_dtype!r}"
            )


class WeightsMemory(StrEnum):
    """Where weights are read from while a model serves. MAPPED: from the checkpoint's mapped files, where
    they store the model's dtype. HUGE: from copies in anonymous memory with huge pages. What is quantised is
    always such a copy."""

    MAPPED = "mapped"
    HUGE = "huge"


@dataclass(frozen=True, slots=True)
class PoolConfig:
    """Sizes of the two pools over all their devices, and of the spill store, in bytes.

    ``weights_pool_bytes`` None: what the models' FFN weights take. ``kv_pool_bytes`` None:
    ``kv_pool_fraction`` of the memory that the weights leave free. ``page_bytes`` None: chosen from the
    models' layouts. ``weights_memory`` holds for attention sides too. With ``device_bytes`` every device has
    so much memory, and KV gets what the weights on a KV device leave of it. ``prefix_cache``: what
    was computed stays in pages that nobody needs, for prompts that begin with the same tokens.

    ``spill_bytes`` of host memory are for pages of preempted sequences, 0 for none. None: as much as the KV
    pool, but no more than a quarter of the memory that the weights and the KV pool leave free, and with GPUs
    no more than 32 GiB.
    """

    kv_pool_bytes: int | None = None
    kv_pool_fraction: float = 0.4
    weights_pool_bytes: int | None = None
    page_bytes: int | None = None
    weights_memory: WeightsMemory = WeightsMemory.MAPPED
    device_bytes: int | None = None
    prefix_cache: bool = True
    spill_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("kv_pool_bytes", "weights_pool_bytes", "page_bytes", "device_bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{name} must be above 0, not {value}")
        if self.spill_bytes is not None and self.spill_bytes < 0:
            raise ConfigError(f"spill_bytes must not be below 0: {self.spill_bytes}")
        if self.device_bytes is not None and self.kv_pool_bytes is not None:
            raise ConfigError(
                f"give either kv_pool_bytes or device_bytes, not {self.kv_pool_bytes:,} and "
                f"{self.device_bytes:,}"
            )
        if not 0 < self.kv_pool_fraction < 1:
            raise ConfigError(f"kv_pool_fraction must be between 0 and 1, not {self.kv_pool_fraction}")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """How requests become micro-batches.

    ``ttft_target`` and ``tbt_target`` (ns) order the work; they are aims, not limits. Prompt chunks are
    multiples of ``chunk_quantum`` tokens (so that numerics do not depend on load), as many as fit
    ``chunk_layer_cost`` ns a layer by the cost model, ``max_chunk_tokens`` at most. A decode grant runs
    ``decode_steps`` tokens before it returns, unless it is recalled; where more sequences decode than
    ``max_batch_rows``, they take turns of ``turn_steps``. ``max_waiting`` bounds each model's queue,
    ``max_running`` the sequences that hold pages. While some run, another starts only if the chance that they
    all outgrow the KV pool is at most ``outgrowth_risk`` (1: whatever the chance).
    """

    ttft_target: Nanoseconds = Nanoseconds(1 * SECOND)
    tbt_target: Nanoseconds = Nanoseconds(100 * MILLISECOND)
    chunk_quantum: int = 64
    max_chunk_tokens: int = 512
    chunk_layer_cost: Nanoseconds = Nanoseconds(15 * MILLISECOND)
    max_batch_rows: int = 32
    max_prefill_rows: int = 8
    decode_steps: int = 64
    turn_steps: int = 4
    max_waiting: int = 1024
    max_running: int = 256
    outgrowth_risk: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.outgrowth_risk <= 1:
            raise ConfigError(f"outgrowth_risk must be above 0 and at most 1, not {self.outgrowth_risk}")
        for name in self.__slots__:
            if name != "outgrowth_risk" and getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.decode_steps > MOST_DECODE_STEPS:
            raise ConfigError(f"decode_steps must be at most {MOST_DECODE_STEPS}, not {self.decode_steps}")
        if self.max_chunk_tokens < self.chunk_quantum:
            raise ConfigError(
                f"max_chunk_tokens {self.max_chunk_tokens} is below chunk_quantum {self.chunk_quantum}"
            )


class Mode(StrEnum):
    """How models share the devices' memory. CROSSPOOL: two pools, any page to any model. MONOLITHIC: a
    model's weights and KV are on one device, or, with tensor sharding, parts of both on each device; any
    model there may take its KV pages. STATIC: likewise, but each model has a share of its own: its
    kv_floor_bytes and kv_cap_bytes, and what these leave open is divided equally among the models."""

    CROSSPOOL = "crosspool"
    MONOLITHIC = "monolithic"
    STATIC = "static"


class Kernels(StrEnum):
    """What computes. COMPILED: resident teams in compiled code. REFERENCE: plain torch with Python between
    all layer tasks, slow and simple: what the former is held against."""

    COMPILED = "compiled"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything one engine process (a cell) is made from.

    In modes other than CROSSPOOL both lists of devices are the same, and every model is wholly on one of
    them, unless ``sharding`` is TENSOR: then every model is on all. ``threads`` is the number of cores each
    device computes with; None divides the machine's cores among the teams. With the reference kernels one of
    each team's is left to whoever delivers the tokens.
    """

    models: tuple[ModelConfig, ...]
    pools: PoolConfig = field(default_factory=PoolConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    kv_devices: tuple[str, ...] = ("cpu:0",)
    weights_devices: tuple[str, ...] = ("cpu:0",)
    sharding: Sharding = Sharding.LAYER
    threads: int | None = None
    kernels: Kernels = Kernels.COMPILED
    mode: Mode = Mode.CROSSPOOL

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("no model is configured")
        names = [model.name for model in self.models]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"model names must differ; given twice: {', '.join(twice)}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        if self.mode is not Mode.CROSSPOOL and self.kv_devices != self.weights_devices:
            raise ConfigError(
                f"in mode {self.mode} KV devices and weights devices are the same, not "
                f"{', '.join(self.kv_devices)} and {', '.join(self.weights_devices)}"
            )
        _ = self.topology
        if self.kernels is Kernels.REFERENCE:
            self._check_reference()

    def _check_reference(self) -> None:
        """Plain torch computes with the checkpoint's own tensors."""
        if self.pools.weights_memory is not WeightsMemory.MAPPED:
            raise ConfigError(f"weights_memory {self.pools.weights_memory} needs the compiled kernels")
        for model in self.models:
            if model.weights_dtype == "int8":
                raise ConfigError(f"model {model.name}: weights_dtype int8 needs the compiled kernels")

    @property
    def topology(self) -> Topology:
        whole = self.mode is not Mode.CROSSPOOL and self.sharding is not Sharding.TENSOR
        return Topology(self.kv_devices, self.weights_devices, Sharding.MODEL if whole else self.sharding)

    def kv_copies(self, kv_heads: int) -> int:
        """How often a token's KV is kept: once, but where each device has a part of every model's heads, and
        heads are fewer than devices."""
        if self.mode is Mode.CROSSPOOL or self.sharding is not Sharding.TENSOR:
            return 1
        return -(-len(self.kv_devices) // kv_heads)
