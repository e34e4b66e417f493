"""How hidden states cross between the two sides of a micro-batch."""

from __future__ import annotations

from torch import Tensor


class HiddenStateChannel:
    """One micro-batch's hidden states on their way, within one address space.

    The attention side sends the input of a layer's FFN, every device that takes part receives it and sends
    its part of the output back, and the attention side receives their sum. The order of layer tasks
    (core/in_flight.py) sees to it that nobody receives before all have sent.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def send_input(self, hidden: Tensor) -> None:
        """Attention side: [T, H], read by the FFN side and written by nobody."""
        self._input = hidden

    def receive_input(self) -> Tensor:
        """FFN side: what the attention side sent."""
        assert self._input is not None
        return self._input

    def send_output(self, part: int, hidden: Tensor) -> None:
        """FFN side: this device's part [T, H] of the sum."""
        self._outputs[part] = hidden

    def receive_output(self) -> Tensor:
        """Attention side: the FFN's output [T, H], parts added in float32 in their order."""
        outputs, self._outputs = self._outputs, {}
        if len(outputs) == 1:
            return outputs[0]
        total = outputs[0].float()
        for part in range(1, len(outputs)):
            total = total + outputs[part].float()
        return total.to(outputs[0].dtype)
