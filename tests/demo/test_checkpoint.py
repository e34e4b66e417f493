from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from crosspool.demo.checkpoint import to_bf16, weights_bytes, write_safetensors

pytestmark = pytest.mark.backend


def as_bf16_tensor(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)


def test_rounding_equals_torch() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, size=200_000, dtype=np.uint32)
    ties = rng.integers(0, 0x7F00, size=1000, dtype=np.uint32) << 16 | 0x8000
    values = np.concatenate([bits, ties]).view(np.float32)
    values = values[np.isfinite(values)]
    assert torch.equal(as_bf16_tensor(to_bf16(values)), torch.from_numpy(values).bfloat16())


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_weight_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="infinite or not a number"):
        to_bf16(np.array([1.0, bad], dtype=np.float32))


def test_the_file_is_read_back_by_safetensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    matrix = to_bf16(rng.standard_normal((3, 5), dtype=np.float32))
    vector = to_bf16(rng.standard_normal(7, dtype=np.float32))
    tensors = [("b.matrix", matrix), ("a.vector", vector), ("copy", matrix), ("turned", matrix.T)]
    told: list[int] = []
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors, told.append)

    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == sorted(name for name, _ in tensors)
        for name, values in tensors:
            assert torch.equal(file.get_tensor(name), as_bf16_tensor(np.ascontiguousarray(values)))
    assert told == [30, 14, 30, 30]
    assert weights_bytes(tensors) == 104
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (8 + header) % 64 == 0
    assert path.stat().st_size == 8 + header + 104


def test_a_name_given_twice_is_refused(tmp_path: Path) -> None:
    values = to_bf16(np.ones(2, dtype=np.float32))
    with pytest.raises(ValueError, match="tensor x is given twice"):
        write_safetensors(tmp_path / "model.safetensors", [("x", values), ("x", values)])
