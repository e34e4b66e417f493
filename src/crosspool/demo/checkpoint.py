"""Writes model folders in the hub's layout: bf16 safetensors, and JSON files beside them.

safetensors format: eight bytes of header length (little endian), the header as JSON, then the tensors' bytes
without gaps, at the offsets that the header gives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Bf16: TypeAlias = NDArray[np.uint16]
"""bfloat16 values as their 16 bits: numpy has no such type."""

NamedTensor: TypeAlias = tuple[str, Bf16]

DATA_ALIGNMENT = 64


def to_bf16(values: NDArray[np.float32]) -> Bf16:
    """Round float32 to bfloat16, half to even. Raises ValueError for infinities and NaN."""
    if not np.isfinite(values).all():
        raise ValueError("a weight is infinite or not a number")
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded: Bf16 = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def weights_bytes(tensors: Iterable[NamedTensor]) -> int:
    return sum(values.nbytes for _, values in tensors)


def write_safetensors(
    path: Path, tensors: Iterable[NamedTensor], on_bytes: Callable[[int], None] | None = None
) -> None:
    """Write tensors to one file, in the order given. An array may be given under several names.

    ``on_bytes`` is told the number of bytes after each tensor. The data begin at a multiple of 64 bytes.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors:
        if name in header:
            raise ValueError(f"tensor {name} is given twice")
        start, end = end, end + values.nbytes
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % DATA_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for _, values in tensors:
            file.write(np.ascontiguousarray(values).data)
            if on_bytes is not None:
                on_bytes(values.nbytes)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
