"""Weights of every family: exactly the bytes the spec says, mapped where they can be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from crosspool.core.errors import MissingTensorError, ModelLoadError, TensorShapeError
from crosspool.core.spec import ModelSpec
from crosspool.models.loader import Checkpoint, load_attention_side, load_ffn
from crosspool.models.registry import read_spec
from helpers_model_configs import CONFIGS
from helpers_models import PagedModel, random_model, save_model

pytestmark = pytest.mark.backend


def stored(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    return save_model(random_model(CONFIGS[name]()).to(dtype), folder)


def load(folder: Path, dtype: str = "auto") -> tuple[ModelSpec, Any, list[Any]]:
    spec, checkpoint = read_spec(folder, dtype), Checkpoint(folder)
    ffns = [load_ffn(spec, checkpoint, layer) for layer in range(spec.num_layers)]
    return spec, load_attention_side(spec, checkpoint), ffns


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the saved file, or leave them out."""
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}, file)


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_are_those_of_the_spec(tmp_path: Path, name: str) -> None:
    folder = stored(tmp_path, name)
    for dtype in ("auto", "float32"):
        spec, side, ffns = load(folder, dtype)
        assert side.bytes == spec.attention_side_bytes
        assert [weights.bytes for weights in ffns] == [
            spec.ffn_bytes(layer) for layer in range(spec.num_layers)
        ]
        assert all(weights.mapped == (dtype == "auto") for weights in ffns)
        tensors = [*side.tensors(), *(tensor for weights in ffns for tensor in weights.tensors())]
        assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_views_lie_in_the_mapped_file(tmp_path: Path) -> None:
    folder = stored(tmp_path, "qwen3-moe-normalised")
    _, side, ffns = load(folder)
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [line[0].split("-") for line in lines if line[-1] == str(folder / "model.safetensors")]
    ranges = [range(int(first, 16), int(last, 16)) for first, last in bounds]
    matrices = [
        *side.tensors(),
        *(tensor for weights in ffns for expert in weights.experts for tensor in expert),
    ]
    assert all(any(matrix.data_ptr() in addresses for addresses in ranges) for matrix in matrices)


def test_a_tied_head_is_the_embedding_even_if_one_is_stored(tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama-tied-llama3")
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, **{"lm_head.weight": torch.zeros_like(embedding)})
    _, side, _ = load(folder)
    assert side.head is side.embedding


def test_an_untied_head_is_its_own(tmp_path: Path) -> None:
    folder = stored(tmp_path, "llama")
    _, side, _ = load(folder)
    assert not torch.equal(side.head, side.embedding)
    change_tensors(folder, **{"lm_head.weight": None})
    with pytest.raises(MissingTensorError, match=r"no tensor lm_head\.weight"):
        load(folder)


def test_a_selection_bias_stays_in_float32(tmp_path: Path) -> None:
    folder = stored(tmp_path, "glm-groups")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    exact = torch.arange(15) + 2.0**-20
    change_tensors(folder, **{name: exact})
    _, _, ffns = load(folder)
    assert torch.equal(ffns[1].selection_bias, exact)
    assert ffns[1].mapped
    change_tensors(folder, **{name: exact.bfloat16()})
    _, _, ffns = load(folder)
    assert ffns[1].selection_bias.dtype is torch.float32
    assert ffns[1].mapped


def test_experts_are_in_order_and_not_mixed_up(tmp_path: Path) -> None:
    folder = stored(tmp_path, "mixtral-7-experts-window")
    saved = load_file(folder / "model.safetensors")
    _, _, ffns = load(folder)
    for index, expert in enumerate(ffns[2].experts):
        prefix = f"model.layers.2.block_sparse_moe.experts.{index}"
        assert torch.equal(expert.gate, saved[f"{prefix}.w1.weight"])
        assert torch.equal(expert.up, saved[f"{prefix}.w3.weight"])
        assert torch.equal(expert.down, saved[f"{prefix}.w2.weight"])


def test_a_shard_index_is_followed(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    model = random_model(CONFIGS["qwen3-moe-normalised"]())
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    whole = PagedModel(save_model(model, tmp_path / "whole"))
    parts = PagedModel(folder)
    tokens = [1, 2, 3]
    torch.testing.assert_close(whole.prefill("a", tokens), parts.prefill("a", tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "model.layers.3.self_attn.o_proj.weight"),
        ("qwen2", "model.layers.0.self_attn.k_proj.bias"),
        ("qwen3-moe-normalised", "model.layers.2.mlp.experts.6.up_proj.weight"),
        ("deepseek-v2-yarn", "model.layers.3.mlp.shared_experts.down_proj.weight"),
        ("glm-groups", "model.layers.1.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str, tensor: str) -> None:
    folder = stored(tmp_path, name)
    change_tensors(folder, **{tensor: None})
    with pytest.raises(MissingTensorError) as error:
        load(folder)
    assert f"{folder}: no tensor {tensor} " in str(error.value)


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    folder = stored(tmp_path, "mixtral-3-experts")
    file = folder / "config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**values, "intermediate_size": 23}), encoding="utf-8")
    with pytest.raises(TensorShapeError) as error:
        load(folder)
    message = str(error.value)
    assert "model.safetensors: model.layers.0.block_sparse_moe.experts.0.w1.weight" in message
    assert "[22, 36]" in message
    assert "[23, 36]" in message


def test_all_of_it_is_a_model_load_error(tmp_path: Path) -> None:
    """So that one model's failure is told from the engine's own."""
    folder = stored(tmp_path, "llama")
    (folder / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ModelLoadError):
        load(folder)
