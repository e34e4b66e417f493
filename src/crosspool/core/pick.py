"""The order rule: which layer task runs next. One pure function over integer columns.

Workers, the simulator and the tests all call this very function, so what is proved about it in virtual time
holds on the machine.

A decode may begin its pass as late as ``start_by`` and still deliver in time. Before that moment prefill uses
the slack. From that moment on a token lets **at most one** prefill layer task go before it, on either side
and in all its layers: prefill takes that one when the side would be idle, or when it has itself waited too
long. So a token is late by one prefill layer task at most, and a prefill advances by at least a layer task
per token: it never starves. (Between two grants of a decode, both sides may begin a chunk each before the
next grant is there; these run side by side, and the token is late by the longer one.)
"""

from __future__ import annotations

from collections.abc import Sequence

NOTHING = -1


def pick(
    ready: Sequence[int],
    prefill: Sequence[int],
    start_by: Sequence[int],
    order: Sequence[int],
    cost: Sequence[int],
    passed: Sequence[int],
    now: int,
) -> int:
    """The index of the layer task to run now on one side, or NOTHING.

    Columns hold one entry per micro-batch in flight, on both sides: ``ready`` is 1 if its next layer task is
    for this side and may start; ``prefill`` is 1 for a prefill, 0 for a decode; ``start_by`` (ns) the latest
    start of a decode's pass, or the time after which a prefill counts as aged; ``order`` submission order;
    ``cost`` (ns) the predicted time of a prefill's next layer task; ``passed`` the number of prefill layer
    tasks that have gone before a decode's current token out of its slack (see ``delays``).
    """
    decode = NOTHING
    chunk = NOTHING
    decodes = 0
    for i in range(len(ready)):
        decodes += 1 - prefill[i]
        if not ready[i]:
            continue
        best = chunk if prefill[i] else decode
        if best == NOTHING or (start_by[i], order[i]) < (start_by[best], order[best]):
            if prefill[i]:
                chunk = i
            else:
                decode = i
    if chunk == NOTHING or decodes == 0:
        return decode if chunk == NOTHING else chunk
    delayed = 0
    for i in range(len(ready)):
        if not prefill[i] and delays(start_by[i], cost[chunk], now):
            delayed += 1
            if passed[i] > 0:
                return decode
    if delayed == 0 or decode == NOTHING or now >= start_by[chunk]:
        return chunk
    return decode


def delays(start_by: int, cost: int, now: int) -> bool:
    """Whether a prefill layer task of ``cost`` ns begun now ends after a decode's latest start."""
    return now + cost > start_by
