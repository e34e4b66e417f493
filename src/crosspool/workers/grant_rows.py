"""What every executor that lays grants out in memory does with their rows."""

from __future__ import annotations

import numpy as np

from crosspool.core.batch import Grant, Row, TokenChoice
from crosspool.core.errors import InvariantError
from crosspool.core.kv_layout import KvLayout
from crosspool.kernels.choice_fields import describe_choice


def tokens_of(grant: Grant) -> int:
    """Queries of the grant's first and largest pass."""
    return sum(len(row.tokens) for row in grant.rows)


def check_pages(row: Row, layout: KvLayout) -> None:
    """Raises InvariantError if a page that the row will write or see has been given back, or is beyond its
    tables: a page id of -1 would silently be memory before the arena."""
    needed = layout.chunks(row.start + len(row.tokens) + max(0, row.steps - 1))
    for group, pages in enumerate(row.pages):
        first = layout.first_kept_chunk(group, row.start)
        if len(pages) < needed or min(pages[first:needed]) < 0:
            raise InvariantError(
                f"request {row.request}, layer group {group}: pages {first} to {needed - 1} are needed, "
                f"of {pages}"
            )


def describe_row_choice(choice: TokenChoice, steps: int) -> np.ndarray:
    """The fields of kernels/choice_fields.py for a row that makes up to ``steps`` tokens."""
    params = choice.params
    return describe_choice(
        seed=choice.seed,
        index=choice.output_index,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        min_tokens=params.min_tokens,
        stop_token_ids=choice.stop_token_ids,
        prompt=choice.prompt,
        output=choice.output,
        logprobs=params.logprobs,
        steps=steps,
    )
