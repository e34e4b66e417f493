"""A public checkpoint's safetensors, memory-mapped.

Headers are read and bounds-checked by the safetensors library. Nothing else is ever opened: no pickles, no
code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from crosspool.backends.weights_memory import release
from crosspool.core.errors import (
    CorruptCheckpointError,
    MissingTensorError,
    TensorShapeError,
    UnsupportedModelError,
)
from crosspool.core.spec import FLOAT8_BLOCK
from crosspool.kernels.float8 import Float8Weight, dequantise_fp8
from crosspool.models.public_config import read_json
from crosspool.models.weight_names import TensorSlot

INDEX = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
FLOAT8 = "F8_E4M3"
SCALES = "_scale_inv"
"""What is appended to a float8 matrix's name for its scales' (quantisation.py)."""


class MappedFile(Protocol):
    """What is used of the safetensors library's open file."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> Any: ...

    def get_tensor(self, name: str) -> Tensor: ...


class Checkpoint:
    """All weights of a model folder: the files named by its index, or its only safetensors file.

    Opening maps the files and checks their headers; no tensor is read. Raises CorruptCheckpointError naming
    the file, or UnsupportedModelError if the folder holds weights in other formats only.
    """

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        index = self.folder / INDEX
        self._file_of = _read_index(index) if index.is_file() else {}
        files = sorted(set(self._file_of.values())) if self._file_of else [_only_file(self.folder)]
        self._opened = {file: _open(self.folder / file) for file in files}
        self._names = {file: frozenset(opened.keys()) for file, opened in self._opened.items()}
        if not self._file_of:
            self._file_of = dict.fromkeys(self._names[files[0]], files[0])

    def tensor(self, slot: TensorSlot, dtype: torch.dtype) -> Tensor:
        """The tensor of a slot in ``dtype``: a view of the mapped file if it is stored so, else a copy.
        Float8 is multiplied with its scales, and rounded once.

        Raises what ``check`` raises.
        """
        if self.is_float8(slot):
            return dequantise_fp8(*self.float8(slot)).to(dtype)
        return self._opened[self.check(slot)].get_tensor(slot.name).to(dtype)

    def float8(self, slot: TensorSlot) -> Float8Weight:
        """A matrix that is stored in float8: the numbers are a view of the mapped file.

        Raises what ``check`` raises.
        """
        numbers = self._opened[self.check(slot)].get_tensor(slot.name)
        return Float8Weight(numbers, self.tensor(scales_of(slot), torch.float32))

    def check(self, slot: TensorSlot) -> str:
        """The name of the file that holds this slot's tensor, by its header alone, and by that of its scales
        where it is a matrix in float8.

        Raises MissingTensorError, or TensorShapeError for another shape or for a dtype that is not float32,
        bfloat16, float16 or float8.
        """
        file = self._file(slot)
        stored = self._opened[file].get_slice(slot.name)
        shape = tuple(stored.get_shape())
        if shape != slot.shape:
            raise TensorShapeError(
                f"{self.folder / file}: {slot.name} has shape {list(shape)}, "
                f"the config implies {list(slot.shape)}"
            )
        if stored.get_dtype() == FLOAT8 and len(shape) == 2:
            self.check(scales_of(slot))
        elif stored.get_dtype() not in STORED_DTYPES:
            raise TensorShapeError(
                f"{self.folder / file}: {slot.name} is stored as {stored.get_dtype()}, "
                f"only {', '.join(STORED_DTYPES)} are read, and {FLOAT8} of matrices with scales"
            )
        return file

    def release(self) -> None:
        """Give back the memory of what was read so far, to which nobody may have written. Views stay valid:
        reading them on reads the files again."""
        for file in self._opened:
            release(self.folder / file)

    def stored_as(self, slot: TensorSlot, dtype: torch.dtype) -> bool:
        """Whether ``tensor`` would return a view of the mapped file."""
        return STORED_DTYPES.get(self._stored(slot)) is dtype

    def is_float8(self, slot: TensorSlot) -> bool:
        """Whether it is stored in float8."""
        return self._stored(slot) == FLOAT8

    def _stored(self, slot: TensorSlot) -> str:
        stored: str = self._opened[self._file(slot)].get_slice(slot.name).get_dtype()
        return stored

    def _file(self, slot: TensorSlot) -> str:
        file = self._file_of.get(slot.name)
        if file is None:
            raise MissingTensorError(f"{self.folder}: no tensor {slot.name} in {len(self._file_of)} tensors")
        if slot.name not in self._names[file]:
            raise MissingTensorError(f"{self.folder / file}: no tensor {slot.name}, though {INDEX} names it")
        return file


def scales_of(slot: TensorSlot) -> TensorSlot:
    """Of a matrix in float8."""
    return TensorSlot(slot.name + SCALES, tuple(-(-size // FLOAT8_BLOCK) for size in slot.shape))


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name to file name. Files must lie in the folder itself."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptCheckpointError(f"{index}: weight_map must be an object that names tensors")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CorruptCheckpointError(
                f"{index}: {name} should be in a safetensors file of this folder, not in {file!r}"
            )
    return weight_map


def _only_file(folder: Path) -> str:
    if not folder.is_dir():
        raise CorruptCheckpointError(f"{folder} is not a folder")
    names = sorted(file.name for file in folder.iterdir())
    found = [name for name in names if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return "model.safetensors"
    if len(found) == 1:
        return found[0]
    if found:
        raise CorruptCheckpointError(f"{folder} has {len(found)} safetensors files and no {INDEX}")
    others = [name for name in names if name.endswith(OTHER_FORMATS)]
    if others:
        raise UnsupportedModelError(
            f"{folder} has no safetensors, and other formats are not read: {', '.join(others)}"
        )
    raise CorruptCheckpointError(f"{folder} has no safetensors file")


def _open(file: Path) -> MappedFile:
    try:
        opened: MappedFile = safe_open(file, framework="pt")
        return opened
    except (SafetensorError, OSError) as error:
        size = f"{file.stat().st_size:,} bytes" if file.is_file() else "missing"
        raise CorruptCheckpointError(f"{file} ({size}) is not a whole safetensors file: {error}") from error
