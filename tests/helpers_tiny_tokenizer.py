"""A byte-level tokenizer with a chat template, small enough to be made in a test."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<s>", "</s>"
BYTES = 256
BOS_ID, EOS_ID = BYTES, BYTES + 1
VOCAB_SIZE = BYTES + 2
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'nobody' %}{{ raise_exception('nobody may not speak') }}{% endif %}"
    "{{ message.role }}:{{ message.content }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_tiny_tokenizer(folder: Path, *, add_bos_token: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json. A token is a byte; BOS and EOS come after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": BOS,
        "eos_token": EOS,
        "chat_template": CHAT_TEMPLATE,
        "add_bos_token": add_bos_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
