"""A trace of requests to a zoo of models: when each came, for which model, and how long it was."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crosspool.core.errors import ConfigError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MINUTE, HOUR = 60.0, 3600.0
LEAST_REQUESTS = 20
"""Of fewer requests no tail can be told."""
COLUMNS = ("t_seconds", "prompt_tokens", "output_tokens")
MODEL_COLUMNS = ("model_index", "model")


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in the order of their starts; the arrays have one element each.

    ``start`` is in seconds from the beginning of the trace, which lasts ``seconds``. ``models`` counts the
    models: those that got no request are models too.
    """

    start: Floats
    model: Ints
    prompt: Ints
    output: Ints
    models: int
    seconds: float

    def __len__(self) -> int:
        return len(self.start)

    @property
    def hours(self) -> float:
        return self.seconds / HOUR

    def between(self, begin: float, end: float) -> Trace:
        """The requests that start within [begin, end) seconds, in times from ``begin``."""
        first, last = np.searchsorted(self.start, (begin, end))
        kept = slice(int(first), int(last))
        return replace(
            self,
            start=self.start[kept] - begin,
            model=self.model[kept],
            prompt=self.prompt[kept],
            output=self.output[kept],
            seconds=end - begin,
        )

    def of_model(self, model: int) -> Trace:
        """The requests of one model."""
        return self.select(self.model == model)

    def select(self, chosen: NDArray[np.bool_]) -> Trace:
        """The requests for which ``chosen`` is true."""
        return replace(
            self,
            start=self.start[chosen],
            model=self.model[chosen],
            prompt=self.prompt[chosen],
            output=self.output[chosen],
        )


def make_trace(
    start: NDArray[Any],
    model: NDArray[Any],
    prompt: NDArray[Any],
    output: NDArray[Any],
    *,
    models: int = 0,
    seconds: float = 0.0,
) -> Trace:
    """A trace of requests in any order: of at least ``models`` models, for at least ``seconds`` and until the
    end of a minute.

    Raises ConfigError for what no request can have.
    """
    if len(start) < LEAST_REQUESTS:
        raise ConfigError(
            f"a plan needs at least {LEAST_REQUESTS} requests, and there {_are(len(start))}: nothing can be "
            "said about its tail"
        )
    for name, values, low in (("t_seconds", start, 0), ("model_index", model, 0)):
        _check(name, values, low)
    _check("prompt_tokens", prompt, 1)
    _check("output_tokens", output, 0)
    order = np.argsort(start, kind="stable")
    return Trace(
        start=np.asarray(start, np.float64)[order],
        model=np.asarray(model, np.int64)[order],
        prompt=np.asarray(prompt, np.int64)[order],
        output=np.asarray(output, np.int64)[order],
        models=max(models, int(model.max()) + 1),
        seconds=max(seconds, (float(start.max()) // MINUTE + 1) * MINUTE),
    )


def _are(count: int) -> str:
    return f"{'is' if count == 1 else 'are'} {count or 'none'}"


def _check(name: str, values: NDArray[Any], low: int) -> None:
    wrong = ~(np.isfinite(values) & (values >= low))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ConfigError(f"{name} of request {row} is {values[row]}: at least {low} is needed")


def read_trace(path: Path) -> tuple[Trace, tuple[str, ...] | None]:
    """A Parquet file's trace, and the models' names where its column ``model`` holds names.

    Columns: ``t_seconds`` from the start of the file, ``model_index`` or ``model``, ``prompt_tokens``,
    ``output_tokens``; others are not read. Raises ConfigError naming the file and what is wrong.
    """
    columns = _read_columns(path)
    names: tuple[str, ...] | None = None
    if "model" in columns:
        unique, model = np.unique(columns["model"].astype(str), return_inverse=True)
        names = tuple(unique.tolist())
    else:
        model = columns["model_index"]
    try:
        start, prompt, output = (columns[name] for name in COLUMNS)
        return make_trace(start, model, prompt, output), names
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _read_columns(path: Path) -> dict[str, NDArray[Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        needed = _needed_columns(path, parquet.read_schema(path).names)
        table = parquet.read_table(path, columns=needed)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
    for name in needed:
        if table[name].null_count:
            raise ConfigError(f"{path}: column {name} has {table[name].null_count:,} empty values")
        kind = table.schema.field(name).type
        if name != "model" and not (pyarrow.types.is_integer(kind) or pyarrow.types.is_floating(kind)):
            raise ConfigError(f"{path}: column {name} must hold numbers, not {kind}")
    return {name: table[name].to_numpy() for name in needed}


def _needed_columns(path: Path, names: list[str]) -> list[str]:
    missing = [name for name in COLUMNS if name not in names]
    model = next((name for name in MODEL_COLUMNS if name in names), None)
    if model is None:
        missing.append("model_index (or model)")
    if missing or model is None:
        raise ConfigError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(names)}")
    return [*COLUMNS, model]
