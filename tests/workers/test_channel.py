"""The hand-off between the two sides."""

from __future__ import annotations

import pytest
import torch

from crosspool.workers.channel import HiddenStateChannel

pytestmark = pytest.mark.backend


def test_one_part_passes_as_it_is():
    channel = HiddenStateChannel()
    sent, result = torch.randn(3, 8), torch.randn(3, 8)
    channel.send_input(sent)
    assert channel.receive_input() is sent
    channel.send_output(0, result)
    assert channel.receive_output() is result


def test_parts_are_added_in_float32_in_their_order_whenever_they_come():
    """In bfloat16, 256 + 1 is 256: only float32 keeps what small parts add up to."""
    parts = [torch.full((2, 4), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    for order in ((0, 1, 2), (2, 0, 1)):
        channel = HiddenStateChannel()
        for part in order:
            channel.send_output(part, parts[part])
        total = channel.receive_output()
        assert total.dtype is torch.bfloat16 and total.eq(258).all()


def test_the_order_of_addition_is_that_of_the_parts():
    parts = [torch.tensor([value]) for value in (1e8, -1e8, 1.0)]
    channel = HiddenStateChannel()
    for part in (2, 1, 0):
        channel.send_output(part, parts[part])
    assert channel.receive_output().item() == 1.0


def test_a_layer_does_not_see_the_outputs_of_the_layer_before():
    channel = HiddenStateChannel()
    channel.send_output(0, torch.tensor([1.0]))
    channel.send_output(1, torch.tensor([10.0]))
    assert channel.receive_output().item() == 11
    channel.send_output(0, torch.tensor([2.0]))
    assert channel.receive_output().item() == 2
