"""Tiny public checkpoints with random weights, and a runner that owns an arena of out-of-order pages."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from crosspool.core.ids import NULL_PAGE
from crosspool.core.kv_layout import make_layout
from crosspool.models.checkpoint import Checkpoint
from crosspool.models.loader import load_attention_side, load_ffn
from crosspool.models.moe_decoder import AttentionSide, ffn
from crosspool.models.registry import read_spec

STALE = 255
"""Every byte of a page that nobody wrote. As float32, bfloat16 or float16 it is not a number."""


def random_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The public implementation with weights that make every part of it matter.

    Matrices keep the variance of what goes through them, norms and biases are not neutral, routers are
    decided.
    """
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + noise(weight, 0.3))
            elif name.endswith("bias"):
                weight.copy_(noise(weight, 0.2))
            elif "embed_tokens" in name and not config.tie_word_embeddings:
                weight.copy_(noise(weight, 1.0))
            else:
                gain = (
                    2.0 if any(part in name for part in (".gate.weight", "lm_head", "embed_tokens")) else 1.0
                )
                weight.copy_(noise(weight, gain * weight.shape[-1] ** -0.5))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(noise(buffer, 0.2))
    return model.eval()


def save_model(model: PreTrainedModel, folder: Path) -> Path:
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    return folder


def public_logprobs(model: PreTrainedModel, tokens: Sequence[int]) -> Tensor:
    """Log-probabilities after each of these tokens, float32 [tokens, V], in one piece."""
    with torch.no_grad():
        logits = model(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


class PagedModel:
    """One checkpoint through the loader, its sequences' KV in shuffled pages of a small arena.

    The page size is such that a page holds 19 tokens of a third of the layers, or of all where there are
    fewer than three, and the arena is full of stale bytes before. Pages that fall out of a window are given
    back at once and soiled.
    """

    def __init__(self, folder: Path, *, dtype: str = "auto", seed: int = 0, num_pages: int = 200) -> None:
        torch.set_num_threads(1)
        self.spec = read_spec(folder, dtype)
        layers_per_page = -(-self.spec.num_layers // 3)
        page_bytes = 19 * layers_per_page * self.spec.kv_bytes_per_token_layer + 8
        self.layout = make_layout(self.spec, page_bytes)
        checkpoint = Checkpoint(folder)
        self.weights = load_attention_side(self.spec, checkpoint)
        self.side = AttentionSide(self.spec, self.layout, self.weights)
        self.ffns = [load_ffn(self.spec, checkpoint, layer) for layer in range(self.spec.num_layers)]
        self.arena = torch.full((num_pages, page_bytes), STALE, dtype=torch.uint8)
        self._free = list(range(num_pages))
        random.Random(seed).shuffle(self._free)
        self._tables: dict[str, list[list[int]]] = {}
        self._lengths: dict[str, int] = {}

    def run(self, rows: dict[str, Sequence[int]]) -> dict[str, Tensor]:
        """One pass: each sequence's next tokens -> log-probabilities after each of them, [tokens, V]."""
        first = [self._lengths.get(name, 0) for name in rows]
        counts = [len(tokens) for tokens in rows.values()]
        for name, count in zip(rows, counts, strict=True):
            self._grow(name, count)
        tables = [[torch.tensor(table) for table in self._tables[name]] for name in rows]
        batch = self.side.batch(first, counts, tables)
        with torch.inference_mode():
            hidden = self.side.embed(torch.tensor([token for tokens in rows.values() for token in tokens]))
            for layer in range(self.spec.num_layers):
                hidden, ffn_input = self.side.attention(layer, hidden, batch, self.arena)
                hidden = hidden + ffn(self.spec.layers[layer].ffn, self.ffns[layer], ffn_input)
            logprobs = self.side.logits(hidden).log_softmax(-1)
        return dict(zip(rows, logprobs.split(counts), strict=True))

    def prefill(self, name: str, tokens: Sequence[int], chunks: Sequence[int] = ()) -> Tensor:
        """A whole prompt, cut into chunks of these sizes and a last one of what is left."""
        bounds = [0]
        for size in chunks:
            bounds.append(bounds[-1] + size)
        bounds.append(len(tokens))
        parts = [self.run({name: tokens[a:b]})[name] for a, b in pairwise(bounds)]
        return torch.cat(parts)

    def greedy(self, name: str, first: int, count: int) -> tuple[list[int], Tensor]:
        """``count`` tokens, the first of which is given: they, and the log-probabilities after each."""
        tokens, logprobs = [first], []
        for _ in range(count):
            logprobs.append(self.run({name: tokens[-1:]})[name])
            tokens.append(int(logprobs[-1].argmax()))
        return tokens[:-1], torch.cat(logprobs)

    def pages(self, name: str, group: int) -> list[int]:
        """The page table of a sequence."""
        return self._tables[name][group]

    def _grow(self, name: str, count: int) -> None:
        """Pages for ``count`` more tokens; those that the first of them cannot see any more go back."""
        tables = self._tables.setdefault(name, [[] for _ in self.layout.groups])
        start = self._lengths.get(name, 0)
        self._lengths[name] = start + count
        for group, table in enumerate(tables):
            for chunk in range(min(self.layout.first_kept_chunk(group, start), len(table))):
                if table[chunk] != NULL_PAGE:
                    self.arena[table[chunk]] = STALE
                    self._free.append(table[chunk])
                    table[chunk] = NULL_PAGE
            while len(table) < self.layout.chunks(start + count):
                table.append(self._free.pop())
