"""Builds the real engine: control plane, devices, pools, loaded models and workers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crosspool.build.control import assemble
from crosspool.build.machine import Machine, make_machine
from crosspool.build.pool_plan import ffn_bytes_by_layer
from crosspool.build.workers import Workers
from crosspool.core.config import EngineConfig, ModelConfig
from crosspool.core.errors import CrossPoolError, ModelLoadError
from crosspool.core.ids import ModelIndex
from crosspool.core.info import LoadProgress, ModelInfo
from crosspool.core.kv_layout import KvLayout
from crosspool.core.spec import ModelSpec
from crosspool.core.topology import Topology
from crosspool.engine.engine import Engine
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.loader import check_tensors, load_attention_side, load_ffn
from crosspool.models.registry import read_spec
from crosspool.pools.ffn import FfnPool
from crosspool.workers.clock import MonotonicClock

Progress = Callable[[LoadProgress], None]

_log = logging.getLogger(__name__)


def build_engine(config: EngineConfig, progress: Progress | None = None) -> Engine:
    """Load all models and start the workers. ``progress`` is called from this thread.

    A model that cannot be loaded fails alone: its ModelInfo says why. Raises ModelLoadError if none can,
    ConfigError for devices that do not exist, OutOfMemoryError if the pools do not fit the memory.
    """
    machine = make_machine(config)
    report = progress or (lambda _: None)
    errors: dict[ModelIndex, str] = {}
    sources = _open_models(config, machine, errors, report)
    specs = {source.index: source.spec for source in sources}
    plan = machine.plan(specs)
    workers = machine.workers(plan, specs)
    loader = _Loader(config.topology, FfnPool(plan.weights_pool_bytes), workers, report)
    for source in sources:
        error = loader.load(source, plan.layouts[source.index])
        if error is not None:
            errors[source.index] = error
    _require_any(config, loader.specs, errors)
    executor = workers.start(partial(_report_compiling, report))
    reasons = {index: _shown(error, config.models[index]) for index, error in errors.items()}
    infos = [
        ModelInfo(model.name, ModelIndex(index), model.path, error=reasons.get(ModelIndex(index)))
        for index, model in enumerate(config.models)
    ]
    try:
        return assemble(
            config, infos, loader.specs, plan, loader.ffn_pool, executor, MonotonicClock(), machine.profile
        )
    except BaseException:
        executor.close()
        raise


@dataclass(frozen=True, slots=True)
class _Source:
    """A model that can be loaded as far as its config and the headers of its files say."""

    index: ModelIndex
    config: ModelConfig
    spec: ModelSpec
    checkpoint: Checkpoint


def _open_models(
    config: EngineConfig, machine: Machine, errors: dict[ModelIndex, str], report: Progress
) -> list[_Source]:
    sources = []
    for number, model in enumerate(config.models):
        index = ModelIndex(number)
        try:
            sources.append(_open_model(index, model, machine))
        except Exception as error:
            errors[index] = _reason(model, error)
            _log.warning("model %s could not be loaded: %s", model.name, errors[index])
            report(LoadProgress(model.name, 0, 0, _shown(errors[index], model)))
    _require_any(config, sources, errors)
    return sources


def _open_model(index: ModelIndex, model: ModelConfig, machine: Machine) -> _Source:
    """Config and headers are held against each other before any pool is sized by them."""
    spec = machine.held(read_spec(model.path, model.dtype, model.weights_dtype))
    checkpoint = Checkpoint(model.path)
    check_tensors(spec, checkpoint)
    return _Source(index, model, spec, checkpoint)


def _reason(model: ModelConfig, error: Exception) -> str:
    """Why a model does not load. An error that nobody meant is logged with its traceback."""
    if isinstance(error, CrossPoolError):
        return str(error)
    _log.error("model %s: loading failed", model.name, exc_info=error)
    return f"loading failed: {type(error).__name__}: {error}"


def _require_any(config: EngineConfig, loaded: Collection[object], errors: Mapping[ModelIndex, str]) -> None:
    if not loaded:
        reasons = "; ".join(f"{config.models[index].name}: {errors[index]}" for index in sorted(errors))
        raise ModelLoadError(f"no model could be loaded: {reasons}")


def _shown(error: str, model: ModelConfig) -> str:
    """An error as clients may see it: with the names of folder and file, but not where they are."""
    return error.replace(f"{Path(model.path).absolute().parent}/", "")


class _Loader:
    """Loads models one after another and hands their weights to the workers.

    ``specs`` are of the models that loaded.
    """

    def __init__(self, topology: Topology, ffn_pool: FfnPool, workers: Workers, report: Progress) -> None:
        self._topology = topology
        self._workers = workers
        self._report = report
        self.ffn_pool = ffn_pool
        self.specs: dict[ModelIndex, ModelSpec] = {}

    def load(self, source: _Source, layout: KvLayout) -> str | None:
        """Load one model wholly or not at all. Returns why it failed."""
        spec, name = source.spec, source.config.name
        bytes_by_layer = ffn_bytes_by_layer(spec, self._topology)
        total = spec.attention_side_bytes + sum(bytes_by_layer)
        self._report(LoadProgress(name, 0, total))
        try:
            self.ffn_pool.begin_load(source.index, name, bytes_by_layer)
        except CrossPoolError as error:
            return self._failed(source, total, str(error))
        try:
            self._load_attention_side(source, layout)
            done = spec.attention_side_bytes
            self._report(LoadProgress(name, done, total))
            for layer, layer_bytes in enumerate(bytes_by_layer):
                self._load_layer(source, layer)
                done += layer_bytes
                self._report(LoadProgress(name, done, total))
        except Exception as error:
            self._unload(source.index)
            return self._failed(source, total, _reason(source.config, error))
        self.ffn_pool.finish_load(source.index, source.config.pinned)
        self.specs[source.index] = spec
        return None

    def _load_attention_side(self, source: _Source, layout: KvLayout) -> None:
        weights = load_attention_side(source.spec, source.checkpoint)
        self._workers.put_attention_side(source.index, source.spec, layout, weights)
        self._release(source)

    def _load_layer(self, source: _Source, layer: int) -> None:
        weights = load_ffn(source.spec, source.checkpoint, layer)
        self._workers.put_ffn(source.index, layer, weights)
        self._release(source)

    def _release(self, source: _Source) -> None:
        """What is copied is in memory once: the rest of the copy needs the room."""
        if self._workers.copies(source.spec):
            source.checkpoint.release()

    def _unload(self, model: ModelIndex) -> None:
        self._workers.remove(model)
        self.ffn_pool.fail_load(model)

    def _failed(self, source: _Source, total: int, error: str) -> str:
        _log.warning("model %s could not be loaded: %s", source.config.name, error)
        self._report(LoadProgress(source.config.name, 0, total, _shown(error, source.config)))
        return error


def _report_compiling(report: Progress, done: int, total: int) -> None:
    report(LoadProgress("compiled kernels", done, total, unit="pieces"))
