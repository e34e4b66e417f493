"""Public checkpoints in float8, and the same weights in the model's dtype."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from helpers_models import save_model

BLOCK = 128
LINEAR = re.compile(r"_proj(_with_mqa)?\.weight$|\.w[123]\.weight$")
"""What such checkpoints have in float8: routers, norms, embeddings and heads stay as they are."""

QUANTISED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def float8_blocks(weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and scales, block by block. Scales are not the least that will do, as a checkpoint's need not
    be."""
    rows, columns = weight.shape
    numbers = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(len(scales)):
        for j in range(scales.shape[1]):
            own = (slice(BLOCK * i, BLOCK * (i + 1)), slice(BLOCK * j, BLOCK * (j + 1)))
            scales[i, j] = weight[own].float().abs().max() / (200 + 200 * torch.rand((), generator=generator))
            numbers[own] = (weight[own].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return numbers, scales


def plain_of(numbers: Tensor, scales: Tensor) -> Tensor:
    """float32, number by number."""
    rows, columns = torch.arange(numbers.shape[0]) // BLOCK, torch.arange(numbers.shape[1]) // BLOCK
    return numbers.float() * scales.float()[rows][:, columns]


def save_float8(
    model: PreTrainedModel,
    folder: Path,
    *,
    kept: Sequence[str] = (),
    scales_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Path, Path]:
    """Folders of a float8 checkpoint, and of one with the same weights dequantised to the model's dtype.

    Modules with these names stay in that."""
    float8, plain = save_model(model, folder / "float8"), save_model(model, folder / "plain")
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(float8 / "model.safetensors")
    stored, dequantised = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if LINEAR.search(name) is None or any(name.startswith(f"{module}.") for module in kept):
            continue
        numbers, scales = float8_blocks(weight, generator)
        scales = scales.to(scales_dtype)
        stored[name], stored[f"{name}_scale_inv"] = numbers, scales
        dequantised[name] = plain_of(numbers, scales).to(weight.dtype)
    save_file(stored, float8 / "model.safetensors")
    save_file(dequantised, plain / "model.safetensors")
    change_config(float8, lambda config: config | {"quantization_config": QUANTISED | _listed(kept)})
    return float8, plain


def change_tensors(folder: Path, target: Path, change: Callable[[str, Tensor], Tensor | None]) -> Path:
    """A copy of a model folder with other tensors. Those of which nothing remains are left out."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    changed = {name: change(name, tensor) for name, tensor in load_file(folder / "model.safetensors").items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    save_file(kept, target / "model.safetensors")
    return target


def change_config(folder: Path, change: Callable[[dict[str, object]], dict[str, object]]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text(encoding="utf-8")))), encoding="utf-8")


def _listed(kept: Sequence[str]) -> dict[str, object]:
    return {"modules_to_not_convert": list(kept)} if kept else {}
