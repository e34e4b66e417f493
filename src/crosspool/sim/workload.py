"""A trace of requests: when each came, to which model, and how long it was. No content."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet

from crosspool.core.errors import ConfigError

HOUR = 3600.0
_COLUMNS = ("t_seconds", "model_index", "prompt_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests in the order of their arrival, one entry each in four arrays of one length.

    ``times`` are seconds since the trace's start, ``models`` the trace's model numbers from 0 on, ``prompts``
    and ``outputs`` numbers of tokens.
    """

    times: npt.NDArray[np.float64]
    models: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64]
    outputs: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.times)

    @property
    def num_models(self) -> int:
        return int(self.models.max(initial=-1)) + 1

    def window(self, start: float, seconds: float) -> Trace:
        """The requests that came in ``seconds`` from ``start`` on; their times count from there."""
        first, last = np.searchsorted(self.times, (start, start + seconds))
        part = slice(int(first), int(last))
        return Trace(self.times[part] - start, self.models[part], self.prompts[part], self.outputs[part])

    def busiest(self, seconds: float, step: float = 600.0) -> float:
        """Start of the window with most requests, among those that start at a multiple of ``step``."""
        starts = np.arange(0.0, max(step, self.times.max(initial=0.0) - seconds + step), step)
        first, last = (np.searchsorted(self.times, starts + offset) for offset in (0.0, seconds))
        return float(starts[np.argmax(last - first)])


def read_trace(path: Path) -> Trace:
    """A parquet file with the columns t_seconds, model_index, prompt_tokens and output_tokens.

    Raises ConfigError for a file that cannot be read, lacks a column, or is not sorted by time.
    """
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from error
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigError(f"the trace {path} lacks the columns {', '.join(missing)}")
    times, models, prompts, outputs = (table[name].to_numpy() for name in _COLUMNS)
    if np.any(times[1:] < times[:-1]):
        raise ConfigError(f"the trace {path} is not sorted by t_seconds")
    if min(prompts.min(initial=1), outputs.min(initial=1)) < 1:
        raise ConfigError(f"the trace {path} has a request without prompt or output tokens")
    return Trace(
        times.astype(np.float64), *(column.astype(np.int64) for column in (models, prompts, outputs))
    )
