"""Float8 checkpoints through the loader, against transformers' dequantisation and plain formulas."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from crosspool.core.errors import MissingTensorError, TensorShapeError
from crosspool.kernels.float8 import dequantise_fp8, quantise_fp8
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.loader import check_tensors, load_attention_side, load_ffn
from crosspool.models.registry import read_spec
from crosspool.models.weight_names import TensorSlot
from helpers_float8 import change_tensors, save_float8
from helpers_model_configs import CONFIGS
from helpers_models import random_model

pytestmark = pytest.mark.backend

NAMES = ["llama", "mixtral-3-experts", "qwen3-moe-dense-layers-tied", "deepseek-v2-query-latent-bias-tied"]


@pytest.mark.parametrize("scales_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_is_that_of_the_dequantised_checkpoint(
    tmp_path: Path, name: str, scales_dtype: torch.dtype
) -> None:
    """Of both sides, in two dtypes; and FFNs in float8 are that too, once they are dequantised."""
    float8, plain = save_float8(random_model(CONFIGS[name]()), tmp_path, scales_dtype=scales_dtype)
    for dtype in ("auto", "bfloat16"):
        stored, wanted = read_spec(float8, dtype), read_spec(plain, dtype)
        held = stored.with_float8(())
        assert held == wanted and stored.weights_dtype == "float8"
        checkpoint, other = Checkpoint(float8), Checkpoint(plain)
        check_tensors(stored, checkpoint)
        sides = [load_attention_side(held, checkpoint), load_attention_side(wanted, other)]
        assert_equal(*(side.tensors() for side in sides))
        for layer in range(held.num_layers):
            found, expected = load_ffn(held, checkpoint, layer), load_ffn(wanted, other, layer)
            assert_equal(found.tensors(), expected.tensors())
            assert not found.mapped and found.bytes == held.ffn_bytes(layer)
            eight = load_ffn(stored, checkpoint, layer)
            assert eight.bytes == stored.ffn_bytes(layer)
            assert eight.mapped == (dtype == "auto" or stored.layers[layer].ffn.router is None)
            pairs = zip(eight.experts, eight.expert_scales, strict=True)
            if eight.shared is not None:
                pairs = iter([*pairs, (eight.shared, eight.shared_scales)])
            matrices = [
                dequantise_fp8(*both).to(expected.experts[0].gate.dtype)
                for numbers, scales in pairs
                for both in zip(numbers, scales, strict=True)
            ]
            known = [*expected.experts, *([] if expected.shared is None else [expected.shared])]
            assert_equal(matrices, [matrix for expert in known for matrix in expert])


def assert_equal(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype is other.dtype and torch.equal(one, other)


def test_dequantised_as_by_transformers(tmp_path: Path) -> None:
    """Which does so for whole blocks."""
    config = CONFIGS["llama"]()
    config.hidden_size, config.intermediate_size = 256, 384
    config.num_attention_heads, config.num_key_value_heads = 4, 2
    float8, _ = save_float8(random_model(config), tmp_path)
    tensors, checkpoint = load_file(float8 / "model.safetensors"), Checkpoint(float8)
    for name in ("gate_proj", "up_proj", "down_proj"):
        weight = f"model.layers.1.mlp.{name}.weight"
        numbers, scales = tensors[weight], tensors[f"{weight}_scale_inv"]
        assert scales.numel() == 6
        wanted = Fp8Dequantize(None)._dequantize_one(numbers, scales, torch.float32)
        found = checkpoint.tensor(TensorSlot(weight, tuple(numbers.shape)), torch.float32)
        assert torch.equal(found, wanted)


def test_kept_modules_stay_as_they_are(tmp_path: Path) -> None:
    kept = ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn"]
    float8, plain = save_float8(random_model(CONFIGS["llama"]()), tmp_path, kept=kept)
    spec, checkpoint = read_spec(float8), Checkpoint(float8)
    assert [layer.ffn.float8 for layer in spec.layers] == [False, True, True, True]
    assert_equal(
        load_ffn(spec, checkpoint, 0).tensors(), load_ffn(read_spec(plain), Checkpoint(plain), 0).tensors()
    )
    query = load_attention_side(spec, checkpoint).layers[1].attention.query
    assert torch.equal(
        query, load_file(plain / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    )


def test_what_is_stored_otherwise_is_quantised(tmp_path: Path) -> None:
    _, plain = save_float8(random_model(CONFIGS["mixtral-3-experts"]()), tmp_path)
    spec, checkpoint = read_spec(plain, weights_dtype="float8"), Checkpoint(plain)
    found, expected = load_ffn(spec, checkpoint, 2), load_ffn(read_spec(plain), checkpoint, 2)
    assert not found.mapped and found.bytes == spec.ffn_bytes(2)
    for numbers, scales, plain_weights in zip(
        found.experts, found.expert_scales, expected.experts, strict=True
    ):
        for own, scale, weight in zip(numbers, scales, plain_weights, strict=True):
            wanted = quantise_fp8(weight)
            assert torch.equal(own.view(torch.uint8), wanted.numbers.view(torch.uint8))
            assert torch.equal(scale, wanted.scales)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "mlp.experts.2.up_proj", "mlp.experts.0.down_proj"])
def test_scales_that_are_missing_or_wrong_are_found_by_headers(tmp_path: Path, module: str) -> None:
    float8, _ = save_float8(random_model(CONFIGS["qwen3-moe-normalised"]()), tmp_path)
    name = f"model.layers.3.{module}.weight_scale_inv"
    spec = read_spec(float8)
    less = change_tensors(float8, tmp_path / "less", lambda own, it: None if own == name else it)
    with pytest.raises(MissingTensorError, match=f"no tensor {name}"):
        check_tensors(spec, Checkpoint(less))
    more = change_tensors(float8, tmp_path / "more", lambda own, it: it.repeat(2, 1) if own == name else it)
    with pytest.raises(TensorShapeError, match=rf"{name} has shape \[2, 1\], the config implies \[1, 1\]"):
        check_tensors(spec, Checkpoint(more))


def test_reading_a_quantised_spec_needs_no_torch(tmp_path: Path) -> None:
    float8, _ = save_float8(random_model(CONFIGS["llama"]()), tmp_path)
    code = f"import sys; from crosspool.models.registry import read_spec; read_spec({str(float8)!r}); "
    program = [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"]
    assert subprocess.run(program, check=False).returncode == 0
