"""Whether a loop on the device makes one more pass of the grant that the lane runs, without the host.

A loop asks before its first pass, and the end of each pass (pass_end.py) asks again. How many of the grant's
passes may be made for now, the host says in HELD, and may say otherwise at any time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosspool.kernels.triton import grant_words, words
from crosspool.kernels.triton.pass_begin import grant_of

_AGAIN = tl.constexpr(words.AGAIN)
_GRANT_STEPS, _GRANT_OVER = tl.constexpr(grant_words.GRANT_STEPS), tl.constexpr(grant_words.GRANT_OVER)
_FLAGS, _HELD = tl.constexpr(grant_words.FLAGS), tl.constexpr(grant_words.HELD)


def ask_again(lane: Tensor) -> None:
    """AGAIN of a lane that has not begun a pass."""
    _ask_again[(1,)](lane, num_warps=1)


@triton.jit
def store_again(lane, grant, steps, over):
    """AGAIN, when ``steps`` of the grant are left."""
    flags = tl.load(grant + _FLAGS).to(tl.pointer_type(tl.int64))
    held = tl.load(flags + _HELD, volatile=True)
    tl.store(lane + _AGAIN, ((steps > held) & (over == 0)).to(tl.int64))


@triton.jit
def _ask_again(lane):
    grant = grant_of(lane)
    store_again(lane, grant, tl.load(grant + _GRANT_STEPS), tl.load(grant + _GRANT_OVER))
