"""Token choice from logits: penalties, suppression, filters, and a draw that depends on (seed, index) alone.

Each row is computed from its own logits, so a request's tokens do not depend on what else is in the batch.
The order is: penalties, suppression, temperature, min_p, top_k, top_p (over what is left), draw. Among equals
the lowest token id comes first, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class TokenHistory:
    """The tokens before the next one, as penalties see them: which occurred, and how often in the output."""

    def __init__(self, prompt: Iterable[int], output: Iterable[int]) -> None:
        self._output_counts = dict.fromkeys(prompt, 0)
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        """Take one more output token."""
        self._output_counts[token] = self._output_counts.get(token, 0) + 1

    def penalise(self, logits: Tensor, repetition: float, presence: float, frequency: float) -> None:
        """Change one row's logits [V] in place.

        ``repetition``: logits of tokens in prompt or output are divided by it where positive and multiplied
        where negative (CTRL, arXiv 1909.05858, with the sign rule that is common since). ``presence`` is then
        subtracted once, and ``frequency`` once per occurrence, for tokens in the output.
        """
        if not self._output_counts:
            return
        ids = torch.tensor(list(self._output_counts))
        counts = torch.tensor(list(self._output_counts.values()), dtype=logits.dtype)
        values = logits[ids]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[ids] = values - presence * (counts > 0) - frequency * counts


@dataclass(frozen=True, slots=True)
class Choice:
    """How one row's token is chosen.

    ``temperature`` 0 is greedy. ``top_k`` below 1, ``top_p`` 1 and ``min_p`` 0 mean no limit. ``suppressed``
    ids are never chosen; those outside the vocabulary do not matter. ``history`` None: no penalties.
    ``logprobs`` None: none are reported; otherwise the number of alternatives.
    """

    seed: int
    index: int
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    suppressed: Sequence[int] = ()
    history: TokenHistory | None = None
    logprobs: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the token is simply the one with the largest logit."""
        return self.temperature == 0 and self.history is None and not self.suppressed


@dataclass(frozen=True, slots=True)
class Chosen:
    """One row's token. ``logprob``, ``rank`` and ``top`` (id, logprob; best first) only if asked for."""

    token: int
    logprob: float = 0.0
    rank: int = 0
    top: tuple[tuple[int, float], ...] = ()


def choose_tokens(logits: Tensor, choices: Sequence[Choice]) -> list[Chosen]:
    """Choose one token per row of ``logits`` (float32 [R, V]).

    Log-probabilities are those of the logits as given: before penalties, suppression and temperature. Raises
    FloatingPointError for a row whose logits hold no largest number (NaN, or every token suppressed).
    """
    largest, greedy = logits.max(dim=-1)
    if not torch.isfinite(largest).all():
        raise FloatingPointError("the logits hold NaN or infinity")
    tokens: list[int] = greedy.tolist()
    chosen = []
    for row, choice in enumerate(choices):
        token = tokens[row] if choice.plain else _choose(logits[row], choice)
        chosen.append(
            Chosen(token) if choice.logprobs is None else _report(logits[row], token, choice.logprobs)
        )
    return chosen


def uniform(seed: int, index: int) -> float:
    """The draw number ``index`` of ``seed``, uniform in [0, 1), with 53 random bits.

    SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) used as
    a function of its counter; the seed is mixed first, so that neighbouring seeds share no sequence.
    """
    return (_mix(_mix(seed & _MASK) + (index + 1) * _GOLDEN & _MASK) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    """The finaliser of SplitMix64: a bijection on 64 bits."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & _MASK
    return z ^ z >> 31


def _choose(row: Tensor, choice: Choice) -> int:
    row = row.clone()
    if choice.history is not None:
        choice.history.penalise(
            row, choice.repetition_penalty, choice.presence_penalty, choice.frequency_penalty
        )
    for token in choice.suppressed:
        if token < len(row):
            row[token] = -torch.inf
    largest, greedy = row.max(dim=-1)
    if not torch.isfinite(largest):
        raise FloatingPointError("no token is left to choose from")
    if choice.temperature == 0:
        return int(greedy)
    # Differences to the largest are at most 0, so no temperature can make them overflow upwards.
    weights = ((row.double() - largest.double()) / choice.temperature).exp()
    kept = _filter(weights, choice)
    return int(kept[_draw(weights[kept], uniform(choice.seed, choice.index))])


def _filter(weights: Tensor, choice: Choice) -> Tensor:
    """The ids that min_p, top_k and top_p leave of ``weights`` [V], whose largest is 1; ascending."""
    kept = torch.nonzero(weights >= choice.min_p).flatten()
    if 0 < choice.top_k < len(kept):
        kept = kept[best(weights[kept], choice.top_k).sort().values]
    if choice.top_p < 1:
        kept = kept[_nucleus(weights[kept], choice.top_p).sort().values]
    return kept


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Places of the fewest weights, largest first, that reach ``top_p`` of the sum (arXiv 1904.09751)."""
    total = weights.sum()
    # Everything below this bound together is less than 1 - top_p of the sum: it is never reached, nor sorted.
    candidates = torch.nonzero(weights >= (1 - top_p) * total / len(weights)).flatten()
    order = candidates[weights[candidates].argsort(descending=True, stable=True)]
    before = weights[order].cumsum(0) - weights[order]
    return order[: max(1, int((before < top_p * total).sum()))]


def _draw(weights: Tensor, u: float) -> int:
    """Invert the cumulative distribution of ``weights`` at ``u`` in [0, 1); a zero weight is never drawn."""
    cumulative = weights.cumsum(0)
    total = cumulative[-1]
    target = torch.minimum(u * total, torch.nextafter(total, torch.zeros_like(total)))
    return int(torch.searchsorted(cumulative, target, right=True))


def best(values: Tensor, k: int) -> Tensor:
    """Places of the ``k`` largest of ``values`` [N], largest first, the lowest place first among equals."""
    smallest = values.topk(min(k, len(values))).values[-1]
    candidates = torch.nonzero(values >= smallest).flatten()
    return candidates[values[candidates].argsort(descending=True, stable=True)][:k]


def _report(row: Tensor, token: int, alternatives: int) -> Chosen:
    logprobs = row.log_softmax(dim=-1)
    rank = 1 + int((logprobs > logprobs[token]).sum())
    ids = best(logprobs, alternatives) if alternatives else torch.empty(0, dtype=torch.int64)
    top = tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), rank, top)
