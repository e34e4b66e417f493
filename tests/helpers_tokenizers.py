"""Small tokenizers of the two kinds that decoder-only models have, made without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

BOS, EOS = "<s>", "</s>"
CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris.",
    "  Two spaces before, naïve café, Straße, 12,345.67 and a tab\tand lines\n\n\nafter.",
    "日本語のテキスト、中文文本。 Ελληνικά, русский. 🙂🙃👩‍👩‍👧 emoji",
] * 3


def byte_level() -> Tokenizer:
    """Byte-level BPE, as in Llama 3 and Qwen. Ids 0 and 1 are special; 2 is added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[BOS, EOS, AddedToken("<|tool call|>", special=False, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # The trainer makes every token of its list special.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"][2]["special"] = False
    return Tokenizer.from_str(json.dumps(content))


def byte_fallback() -> Tokenizer:
    """SentencePiece-style BPE with byte fallback, as in Llama 2 and Mixtral: spaces are ▁, one is put before
    every text, and characters out of the vocabulary are bytes such as <0xE6>. Texts begin with BOS."""
    pieces = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdefghijklmnopqrstuvwxyzTWP.,?é", "th", "the", "▁the", "he", "▁a", "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("h", "e"), ("▁", "a"), ("▁", "▁")]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 1)]
    )
    tokenizer.add_special_tokens(["<unk>", BOS, EOS])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json as a model folder has them."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
