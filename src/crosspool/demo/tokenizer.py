"""Rebuilds SmolLM2's tokenizer files from GGUF metadata.

Byte-level BPE: digits are cut one by one, the rest by the pattern of GPT-2, then merges apply within each
piece. Tokens of GGUF type "control" are special: they never arise from merges and are skipped in text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crosspool.core.errors import ConfigError
from crosspool.demo.checkpoint import write_json
from crosspool.demo.gguf_llama import GgufLlama

_CONTROL = 3


def write_tokenizer(gguf: GgufLlama, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    kind = gguf.field("tokenizer.ggml.model"), gguf.field("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ConfigError(f"the GGUF file has a tokenizer of kind {kind}, not ('gpt2', 'smollm')")
    tokens: list[str] = gguf.field("tokenizer.ggml.tokens")
    types: list[int] = gguf.field("tokenizer.ggml.token_type")
    special = [(i, token) for i, token in enumerate(tokens) if types[i] == _CONTROL]
    write_json(folder / "tokenizer.json", tokenizer(tokens, gguf.field("tokenizer.ggml.merges"), special))
    roles = {
        role: tokens[gguf.field(f"tokenizer.ggml.{field}")]
        for role, field in (
            ("bos_token", "bos_token_id"),
            ("eos_token", "eos_token_id"),
            ("unk_token", "unknown_token_id"),
            ("pad_token", "padding_token_id"),
        )
    }
    write_json(folder / "special_tokens_map.json", roles)
    config = {
        "add_prefix_space": gguf.field("tokenizer.ggml.add_space_prefix"),
        "added_tokens_decoder": {str(i): _added(token) for i, token in special},
        "chat_template": gguf.field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.field("llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
    }
    write_json(folder / "tokenizer_config.json", config)


def tokenizer(tokens: list[str], merges: list[str], special: list[tuple[int, str]]) -> dict[str, Any]:
    """A tokenizer.json for the ``tokenizers`` library. ``merges`` are pairs joined by one space."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_added(token)} for i, token in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }


def _added(token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": token, **flags}
