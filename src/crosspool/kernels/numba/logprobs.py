"""What is reported of a token beside its id: log-probabilities of the logits as the model gave them."""

from __future__ import annotations

import numpy as np

from crosspool.kernels.choice_fields import LOGPROB, RANK, TOP, TOP_COUNT
from crosspool.kernels.numba.compile import kernel
from crosspool.kernels.numba.exp_double import exp_of_negative
from crosspool.kernels.numba.random_draw import add_up
from crosspool.kernels.numba.ranking import best_of, sort_best


@kernel
def weigh(row, count, best, temperature, weights):
    """``weights`` (float64 [>= count]) become the probabilities that the logits ``row`` (float32) give at
    ``temperature``, divided by that of the largest logit ``best``.

    Differences to the largest are at most 0, so no temperature can make them overflow upwards.
    """
    for i in range(count):
        weights[i] = exp_of_negative((np.float64(row[i]) - np.float64(best)) / temperature)


@kernel
def report_token(row, count, best, token, alternatives, report, at, scratch):
    """Report a ``token`` chosen with the logits ``row`` (float32 [count]), whose largest is at ``best``, in
    the words of ``report`` from ``at`` on.

    Log-probabilities are float32, so tokens share a rank whose logits differ by less than that can tell.
    ``scratch`` is a Scratch (choice.py), of which the row is left alone.
    """
    largest = row[best]
    values = scratch.weights
    weigh(row, count, largest, 1.0, values)
    logarithm = np.float32(np.log(add_up(values, count, scratch.sums)))
    for i in range(count):
        values[i] = np.float64((row[i] - largest) - logarithm)
    own = values[token]
    rank = 1
    for i in range(count):
        rank += values[i] > own
    most = min(alternatives, count)
    bits = report.view(np.float64)
    report[at + TOP_COUNT], bits[at + LOGPROB], report[at + RANK] = most, own, rank
    if most > 0:
        best_of(values, count, most, scratch.heap, scratch.ids)
        sort_best(scratch.heap, scratch.ids, most)
    for place in range(most):
        report[at + TOP + place] = scratch.ids[place]
        bits[at + TOP + alternatives + place] = scratch.heap[place]
