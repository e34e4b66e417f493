"""A model folder's tokenizer, behind the little that the rest of the system asks of one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import tokenizers
from tokenizers.processors import TemplateProcessing

from crosspool.core.errors import ModelLoadError
from crosspool.text.piece_decoder import PieceDecoder, piece_decoder

SPECIAL_TOKEN_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class Tokenizer(Protocol):
    """Text to token ids and back. Safe to use from several threads."""

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        ...

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of control tokens: those that ``skip_special_tokens`` leaves out of a text."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens that have a role, by its name (``bos_token``, ``eos_token``, ...)."""
        ...

    @property
    def leading_spaces(self) -> int:
        """How many spaces at the beginning of a decoded text were put there by encoding."""
        ...

    @property
    def longest_token_bytes(self) -> int:
        """The most bytes of a text that one token stands for, where encoding drops nothing of the text."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        """The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What the token adds to a text, which may be a part of a character. Empty for an unknown id."""
        ...


class FastTokenizer:
    """The Tokenizer of a ``tokenizer.json`` (the ``tokenizers`` library)."""

    def __init__(
        self, backend: tokenizers.Tokenizer, decoder: PieceDecoder, special_tokens: Mapping[str, str]
    ) -> None:
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self._decoder = decoder
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = dict(special_tokens)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.longest_token_bytes = max((len(decoder.piece_bytes(piece)) for piece in vocab), default=0)

    @property
    def leading_spaces(self) -> int:
        return self._decoder.leading_spaces

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        # The batch call, unlike the single one, lets other threads run meanwhile.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool) -> str:
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        kept = (self.token_bytes(token_id) for token_id in token_ids if token_id not in skipped)
        text = b"".join(kept).decode("utf-8", "replace")
        extra = len(text) - len(text.lstrip(" "))
        return text[min(extra, self.leading_spaces) :]

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            piece = self._backend.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
            known = self._bytes[token_id] = b"" if piece is None else self._decoder.piece_bytes(piece)
        return known


def load_tokenizer(folder: str | Path) -> FastTokenizer:
    """Read ``tokenizer.json``, and from ``tokenizer_config.json`` which tokens have a role.

    No code of the folder is run. Raises ModelLoadError, naming the folder, if there is no tokenizer.json or
    it cannot be used.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ModelLoadError(
            f"{folder} has no tokenizer.json: no text can be turned into tokens for this model"
        )
    config = read_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(read_json(folder / "special_tokens_map.json")) | _special_tokens(config)
    try:
        return _usable(tokenizers.Tokenizer.from_file(str(path)), config, special_tokens)
    except ModelLoadError as error:
        raise ModelLoadError(f"the tokenizer of {folder} cannot be used: {error}") from None
    except Exception as error:  # the library raises bare Exception for a file that it cannot read
        raise ModelLoadError(f"{path} is not a tokenizer: {error}") from error


def _usable(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> FastTokenizer:
    decoder = piece_decoder(json.loads(backend.decoder.__getstate__()) if backend.decoder else None)
    backend.no_truncation()
    backend.no_padding()
    _mark_special(backend, special_tokens)
    _add_configured_tokens(backend, config, special_tokens)
    return FastTokenizer(backend, decoder, special_tokens)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if there is no such file. Raises ModelLoadError."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} holds no JSON object")
    return content


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Role to token; a token is written as a string or as an object with its ``content``."""
    found = {}
    for name in SPECIAL_TOKEN_NAMES:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _mark_special(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str]) -> None:
    """Make tokens with a role special even where tokenizer.json has them as plain vocabulary."""
    for content in special_tokens.values():
        if backend.token_to_id(content) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(content, special=True, normalized=False)])


def _add_configured_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], special_tokens: Mapping[str, str]
) -> None:
    """Where the config says whether BOS and EOS are put around a text, it overrides tokenizer.json."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    added = []
    for name in ("bos", "eos"):
        token = special_tokens.get(f"{name}_token", "")
        token_id = backend.token_to_id(token)
        if config.get(f"add_{name}_token") and token_id is not None:
            added.append({"id": name, "ids": [token_id], "tokens": [token]})
    # Tokens go by names of ours: their text could mean something else in a template (":" and "$" do).
    names = [token["id"] for token in added]
    single = [part for part in ("bos", "$A", "eos") if part == "$A" or part in names]
    backend.post_processor = TemplateProcessing(single=single, pair=[*single, "$B"], special_tokens=added)
