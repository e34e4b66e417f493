"""Reads a Llama checkpoint from a GGUF file into the hub's names and layout.

GGUF stores the rows of the query and key projections so that the two elements which the rotary embedding
turns together are neighbours; the hub's Llama has them half a head apart. Everything else is the same, but
named differently. Quantised weights are dequantised and rounded to bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from crosspool.core.errors import ConfigError
from crosspool.demo.checkpoint import NamedTensor, to_bf16

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


class GgufLlama:
    """A GGUF file of the ``llama`` architecture. Raises ConfigError if it is another one."""

    def __init__(self, path: Path) -> None:
        self._reader = GGUFReader(path)
        architecture = self.field("general.architecture")
        if architecture != "llama":
            raise ConfigError(f"{path} holds the GGUF architecture {architecture!r}, not 'llama'")

    def field(self, name: str) -> Any:
        """A metadata value. Raises ConfigError if there is none of that name."""
        field = self._reader.fields.get(name)
        if field is None:
            raise ConfigError(f"the GGUF file lacks the field {name}")
        return field.contents()

    def config(self) -> dict[str, Any]:
        """The hub's config.json."""
        names = {tensor.name for tensor in self._reader.tensors}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.padding_token_id"),
            "hidden_act": "silu",
            "hidden_size": self.field("llama.embedding_length"),
            "intermediate_size": self.field("llama.feed_forward_length"),
            "max_position_embeddings": self.field("llama.context_length"),
            "num_attention_heads": self.field("llama.attention.head_count"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "rms_norm_eps": _shortest(self.field("llama.attention.layer_norm_rms_epsilon")),
            "rope_scaling": None,
            "rope_theta": _shortest(self.field("llama.rope.freq_base")),
            "tie_word_embeddings": "output.weight" not in names,
            "torch_dtype": "bfloat16",
            "vocab_size": self.field("llama.vocab_size"),
        }

    def tensors(self) -> list[NamedTensor]:
        """All weights in bf16 under the hub's names."""
        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        named = []
        for tensor in self._reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            slot = tensor.name.split(".")[-2]
            if slot in heads:
                values = undo_rope_permutation(values, heads[slot])
            named.append((hub_name(tensor.name), to_bf16(values)))
        return named


def hub_name(name: str) -> str:
    """The hub's name of a GGUF llama tensor. Raises ConfigError for one that has no place in a Llama."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match name.split("."):
        case ["blk", layer, slot, "weight"] if slot in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[slot]}.weight"
    raise ConfigError(f"the GGUF file has a tensor {name}, which is none of a Llama's")


def undo_rope_permutation(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection [heads * head_dim, in] from rotary neighbours to rotary halves.

    Within a head, row 2i goes to i and row 2i + 1 to i + head_dim / 2.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _shortest(value: float) -> float:
    """A float32 that was written as a decimal (1e-05), as that decimal again."""
    return float(f"{value:.6g}")
