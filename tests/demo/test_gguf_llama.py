from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from crosspool.core.errors import ConfigError
from crosspool.demo.checkpoint import to_bf16
from crosspool.demo.gguf_llama import GgufLlama, hub_name, undo_rope_permutation
from helpers_bf16 import from_bf16

pytestmark = pytest.mark.unit

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 16, 64


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A one-layer GGUF with tied embeddings; returns the values that a reader should see."""
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(96)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    shapes = {
        "token_embd": (32, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HEADS * HEAD_DIM),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (96, HIDDEN),
        "blk.0.ffn_up": (96, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, 96),
    }
    rng = np.random.default_rng(0)
    seen = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            packed = quantize(values, GGMLQuantizationType.Q4_1)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q4_1)
            values = dequantize(packed, GGMLQuantizationType.Q4_1)
        seen[f"{name}.weight"] = values
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return seen


def rotate(vector: np.ndarray, position: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Rotary embedding written out pair by pair."""
    turned = vector.copy()
    for i, (a, b) in enumerate(pairs):
        angle = position * 10000.0 ** (-2 * i / len(vector))
        turned[a] = vector[a] * np.cos(angle) - vector[b] * np.sin(angle)
        turned[b] = vector[a] * np.sin(angle) + vector[b] * np.cos(angle)
    return turned


def test_undone_rows_give_the_same_scores_with_rotary_halves() -> None:
    """Scores of the stored rows, turned as neighbours, are those of our rows, turned as halves."""
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal((HEADS * HEAD_DIM, HIDDEN)).astype(np.float32) for _ in range(2))
    x, y = rng.standard_normal(HIDDEN), rng.standard_normal(HIDDEN)
    neighbours = [(2 * i, 2 * i + 1) for i in range(HEAD_DIM // 2)]
    halves = [(i, i + HEAD_DIM // 2) for i in range(HEAD_DIM // 2)]
    ours_query, ours_key = undo_rope_permutation(query, HEADS), undo_rope_permutation(key, HEADS)
    for head in range(HEADS):
        rows = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        stored = rotate(query[rows] @ x, 7, neighbours) @ rotate(key[rows] @ y, 3, neighbours)
        ours = rotate(ours_query[rows] @ x, 7, halves) @ rotate(ours_key[rows] @ y, 3, halves)
        unturned = rotate(query[rows] @ x, 7, halves) @ rotate(key[rows] @ y, 3, halves)
        assert ours == pytest.approx(stored, rel=1e-6)
        assert unturned != pytest.approx(stored, rel=1e-3)


def test_a_gguf_file_in_the_hubs_layout(tmp_path: Path) -> None:
    stored = write_gguf(tmp_path / "tiny.gguf")
    gguf = GgufLlama(tmp_path / "tiny.gguf")
    tensors = dict(gguf.tensors())
    assert len(tensors) == len(stored)
    for name, values in stored.items():
        if name.startswith("blk.0.attn_q"):
            values = undo_rope_permutation(values, HEADS)
        if name.startswith("blk.0.attn_k"):
            values = undo_rope_permutation(values, KV_HEADS)
        assert np.array_equal(from_bf16(tensors[hub_name(name)]), from_bf16(to_bf16(values))), name

    config = gguf.config()
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]) == (64, 96, 1)
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["rms_norm_eps"] == 1e-05
    assert config["rope_theta"] == 50000.0
    assert config["tie_word_embeddings"] is True
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (1, 2, 32)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "gpt2")
    with pytest.raises(ConfigError, match="'gpt2', not 'llama'"):
        GgufLlama(tmp_path / "tiny.gguf")


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ConfigError, match=r"lacks the field tokenizer\.chat_template"):
        GgufLlama(tmp_path / "tiny.gguf").field("tokenizer.chat_template")


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(ConfigError, match=r"blk\.0\.attn_q\.bias"):
        hub_name("blk.0.attn_q.bias")
