"""The resident executor on tiny real models: the same tokens on every placement."""

from __future__ import annotations

import pytest

from crosspool.core.request import FinishReason
from helpers_workers import GQA, MLA, PLACEMENTS, PROMPTS, rig

pytestmark = pytest.mark.backend


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("model", [GQA, MLA])
def test_every_placement_makes_the_same_tokens(models, expected, model, placement):
    with rig(*models, resident=True, **PLACEMENTS[placement]) as it:
        devices = len(it.arenas)
        for device in range(devices):
            sequences = [it.sequence(prompt, 24, model=model, device=device) for prompt in PROMPTS]
            assert it.run(*sequences) == expected[model]
            for sequence in sequences:
                assert [event.finish for event in sequence.events] == [None] * 23 + [FinishReason.LENGTH]
