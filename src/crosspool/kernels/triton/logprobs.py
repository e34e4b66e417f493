"""What is reported of a token beside its id: log-probabilities of the logits as the model gave them.

Meaning: kernels/reference/sampling.py. It takes a scan of the logits for each alternative, which only rows
that ask for it pay.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels import choice_fields
from crosspool.kernels.triton.choice_row import chooses, fields_of

_BLOCK = tl.constexpr(4096)
_FIRST, _INDEX = tl.constexpr(choice_fields.FIRST), tl.constexpr(choice_fields.INDEX)
_LOGPROBS, _REPORTS = tl.constexpr(choice_fields.LOGPROBS), tl.constexpr(choice_fields.REPORTS)
_TOP_COUNT, _LOGPROB = tl.constexpr(choice_fields.TOP_COUNT), tl.constexpr(choice_fields.LOGPROB)
_RANK, _TOP = tl.constexpr(choice_fields.RANK), tl.constexpr(choice_fields.TOP)
_INFINITY = tl.constexpr(float("inf"))
_NO_TOKEN = tl.constexpr(2**31 - 1)


def report(lane: Tensor, choices: Tensor, logits: Tensor, chosen: Tensor, mirror: int) -> None:
    """Report the tokens ``chosen`` (int64 [rows]) of those rows that want it, after ``choose``.

    ``logits`` float32 [rows, V] are as the model gave them; arguments are those of ``choose``. A report goes
    to its place in the row's fields (choice_fields.py), ``mirror`` bytes further on: where the host reads it.
    """
    rows, vocab = logits.shape
    _report[(rows,)](lane, choices, logits, chosen, mirror, vocab, num_warps=8, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["mirror"])
def _report(lane, choices, logits, chosen, mirror, vocab):
    """One program a row."""
    row = tl.program_id(0)
    if not chooses(lane, choices, row):
        return
    fields = fields_of(choices, row)
    alternatives, token = tl.load(fields + _LOGPROBS), tl.load(chosen + row)
    if (alternatives < 0) | (token < 0):
        return
    given = logits + row.to(tl.int64) * vocab
    most, logarithm = _scale(given, vocab)
    own = (tl.load(given + token) - most) - logarithm
    step = tl.load(fields + _INDEX) - 1 - tl.load(fields + _FIRST)
    size = _TOP + 2 * alternatives
    words = fields + tl.load(fields + _REPORTS) + step * size
    words = (words.to(tl.int64) + mirror).to(tl.pointer_type(tl.int64))
    count = tl.minimum(alternatives, vocab)
    tl.store(words + _TOP_COUNT, count)
    tl.store(words + _LOGPROB, own.to(tl.float64).to(tl.int64, bitcast=True))
    tl.store(words + _RANK, _rank(given, vocab, most, logarithm, own))
    last, last_id = tl.full((), _INFINITY, tl.float32), tl.full((), -1, tl.int32)
    for place in range(count):
        last, last_id = _next_best(given, vocab, most, logarithm, last, last_id)
        tl.store(words + _TOP + place, last_id.to(tl.int64))
        tl.store(words + _TOP + alternatives + place, last.to(tl.float64).to(tl.int64, bitcast=True))


@triton.jit
def _scale(given, vocab):
    """The largest logit, and the logarithm of the sum of what the logits are when that is taken from them."""
    most, total = tl.full((), -_INFINITY, tl.float32), tl.full((), 0.0, tl.float64)
    for begin in range(0, vocab, _BLOCK):
        token = begin + tl.arange(0, _BLOCK)
        most = tl.maximum(most, tl.max(tl.load(given + token, token < vocab, -_INFINITY)))
    for begin in range(0, vocab, _BLOCK):
        token = begin + tl.arange(0, _BLOCK)
        values = tl.load(given + token, token < vocab, -_INFINITY)
        total += tl.sum(tl.exp(values.to(tl.float64) - most.to(tl.float64)))
    return most, tl.log(total).to(tl.float32)


@triton.jit
def _rank(given, vocab, most, logarithm, own):
    rank = tl.full((), 1, tl.int64)
    for begin in range(0, vocab, _BLOCK):
        token = begin + tl.arange(0, _BLOCK)
        values = (tl.load(given + token, token < vocab, -_INFINITY) - most) - logarithm
        rank += tl.sum((values > own).to(tl.int64))
    return rank


@triton.jit
def _next_best(given, vocab, most, logarithm, last, last_id):
    """The best after one that was ``last``: of equals, the lowest id comes first."""
    best, best_id = tl.full((), -_INFINITY, tl.float32), tl.full((), _NO_TOKEN, tl.int32)
    for begin in range(0, vocab, _BLOCK):
        token = begin + tl.arange(0, _BLOCK)
        values = (tl.load(given + token, token < vocab, -_INFINITY) - most) - logarithm
        after = (token < vocab) & ((values < last) | ((values == last) & (token > last_id)))
        highest = tl.max(tl.where(after, values, -_INFINITY))
        lowest_id = tl.min(tl.where(after & (values == highest), token, _NO_TOKEN))
        better = (highest > best) | (best_id == _NO_TOKEN)
        best, best_id = tl.where(better, highest, best), tl.where(better, lowest_id, best_id)
    return best, best_id
