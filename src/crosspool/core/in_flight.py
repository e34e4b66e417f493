"""The micro-batches in flight: where each one is in its layers, and what a team runs next.

A pure state machine over integers, without threads or tensors. The real executor drives it under a lock, the
simulator in virtual time. Each pass of a micro-batch is: attention and FFN of layer 0, of layer 1, ..., and
last the head (final norm, LM head, token choice) on the attention side.

If rows have pages on other devices than their home, each attention half is three tasks: its begin at home,
a part of the context on every device that has some, and its end at home. To the order rule these are one
task: once it has begun, what is left of it comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from crosspool.core.batch import Grant, Half, Phase, Piece
from crosspool.core.errors import InvariantError
from crosspool.core.ids import GrantId, KvDevice, ModelIndex, Nanoseconds, RequestId, WeightsDevice
from crosspool.core.order_rule import already_passed, note_chunk, pick_one
from crosspool.core.pick import NOTHING
from crosspool.core.topology import Team, Topology


@dataclass(frozen=True, slots=True)
class LayerTask:
    """One half of one layer of one micro-batch, or one device's share of it.

    ``layer`` equal to the model's number of layers is the head. ``part`` counts the devices that share an FFN
    (``parts`` of them, in the order in which their partial results are added), or the context of an attention
    half's PART (the home first).
    """

    grant: GrantId
    step: int
    layer: int
    half: Half
    team: Team
    part: int
    parts: int
    piece: Piece = Piece.WHOLE


@dataclass(slots=True)
class MicroBatch:
    """One grant on its way.

    ``alive`` are the rows that still want tokens (one set for the batch's whole life). ``passed`` counts
    prefill layer tasks that went before the current token out of its slack (see core/pick.py).
    ``unstarted`` maps teams to the parts of the current layer half that they have not begun.
    """

    grant: Grant
    start_by: int
    alive: set[RequestId]
    step: int = 0
    layer: int = 0
    half: Half = Half.ATTENTION
    piece: Piece = Piece.WHOLE
    passed: int = 0
    unstarted: dict[Team, int] = field(default_factory=dict)
    parts: int = 1
    running: int = 0
    recalled: bool = False
    failed: bool = False

    @property
    def decoding(self) -> bool:
        return self.grant.phase is Phase.DECODE

    @property
    def begun(self) -> bool:
        """Whether some of the current layer task has been done, or runs."""
        return len(self.unstarted) < self.parts or not self.piece.begins


class InFlight:
    """All micro-batches in flight and the layer task each team runs."""

    def __init__(self, topology: Topology, layers: Callable[[ModelIndex], int]) -> None:
        self._topology = topology
        self._attention_teams = [
            topology.attention_team(KvDevice(i)) for i in range(len(topology.kv_devices))
        ]
        self._weights_teams = [
            topology.weights_team(WeightsDevice(i)) for i in range(len(topology.weights_devices))
        ]
        self._layers = layers
        self._batches: dict[GrantId, MicroBatch] = {}
        self._chunks_running: dict[GrantId, int] = {}

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, grant: GrantId) -> MicroBatch:
        return self._batches[grant]

    @property
    def batches(self) -> Collection[MicroBatch]:
        return self._batches.values()

    def submit(self, grant: Grant, now: Nanoseconds) -> None:
        """Take a grant. A prefill layer task that is running already may count as this token's one."""
        if grant.id in self._batches:
            raise InvariantError(f"grant {grant.id} is already in flight")
        batch = MicroBatch(grant, grant.start_by, {row.request for row in grant.rows})
        batch.passed = already_passed(batch, self._chunks_running.values())
        batch.piece = self._first_piece(batch)
        self._batches[grant.id] = batch
        self._enter(batch)

    def cancel(self, request: RequestId) -> None:
        """Let a request's rows stop at the next boundary."""
        for batch in self._batches.values():
            batch.alive.discard(request)

    def recall(self, grant: GrantId) -> None:
        """Let a grant retire at its next step boundary, if it is still in flight."""
        if grant in self._batches:
            self._batches[grant].recalled = True

    def start(self, team: Team, now: Nanoseconds) -> LayerTask | None:
        """The layer task that this team runs now, or None.

        What is left of a layer task that other teams have begun comes first: it is the same one task to
        whoever waits for it.
        """
        batches = list(self._batches.values())
        ready = [team in batch.unstarted for batch in batches]
        if not any(ready):
            return None
        for batch, here in zip(batches, ready, strict=True):
            if here and batch.begun:
                return self._begin(batch, team)
        chosen = pick_one(ready, batches, now)
        if chosen == NOTHING:
            return None
        batch = batches[chosen]
        if not batch.decoding:
            self._chunks_running[batch.grant.id] = note_chunk(batch.grant, batches, now)
        return self._begin(batch, team)

    def finish(self, task: LayerTask, now: Nanoseconds, ended: Sequence[RequestId] = ()) -> bool:
        """A layer task is done. ``ended`` are the rows for which the head chose their last token.

        Returns whether the micro-batch has retired: nothing of it runs or will run again.
        """
        batch = self._batches[task.grant]
        batch.running -= 1
        batch.alive.difference_update(ended)
        if batch.unstarted or batch.running:
            return False
        if batch.failed or batch.piece.ends:
            self._chunks_running.pop(task.grant, None)
        if not batch.failed:
            step = batch.step
            self._advance(batch, now)
            over = batch.step == batch.grant.steps or (batch.recalled and batch.step > step)
            if batch.alive and not over:
                self._enter(batch)
                return False
        del self._batches[task.grant]
        return True

    def fail(self, task: LayerTask, now: Nanoseconds) -> bool:
        """A layer task could not be done: nothing more of its micro-batch starts.

        Returns whether the micro-batch has retired; if not, ``finish`` of its last running task says so.
        """
        batch = self._batches[task.grant]
        batch.failed = True
        batch.unstarted.clear()
        return self.finish(task, now)

    def _begin(self, batch: MicroBatch, team: Team) -> LayerTask:
        part = batch.unstarted.pop(team)
        batch.running += 1
        return LayerTask(
            batch.grant.id, batch.step, batch.layer, batch.half, team, part, batch.parts, batch.piece
        )

    def _advance(self, batch: MicroBatch, now: int) -> None:
        layers = self._layers(batch.grant.model)
        if batch.layer == layers:
            batch.step += 1
            batch.layer = 0
            batch.piece = self._first_piece(batch)
            batch.start_by = now + batch.grant.interval
            batch.passed = already_passed(batch, self._chunks_running.values())
        elif not batch.piece.ends:
            batch.piece = Piece(batch.piece + 1)
        elif batch.half is Half.ATTENTION:
            batch.half, batch.piece = Half.FFN, Piece.WHOLE
        else:
            batch.half = Half.ATTENTION
            batch.layer += 1
            batch.piece = self._first_piece(batch)
            if batch.layer == layers and not any(row.choice for row in batch.grant.rows):
                batch.step += 1

    def _first_piece(self, batch: MicroBatch) -> Piece:
        """Of the attention half that comes next, or of the head."""
        is_head = batch.layer == self._layers(batch.grant.model)
        return Piece.BEGIN if batch.grant.elsewhere and not is_head else Piece.WHOLE

    def _enter(self, batch: MicroBatch) -> None:
        """Offer the tasks of the current layer half to the teams that run it."""
        grant = batch.grant
        if batch.piece is Piece.PART:
            homes = (grant.kv_device, *grant.elsewhere)
            batch.unstarted = {self._attention_teams[device]: part for part, device in enumerate(homes)}
        elif batch.half is Half.ATTENTION:
            batch.unstarted = {self._attention_teams[grant.kv_device]: 0}
        else:
            devices = self._topology.ffn_devices(batch.layer, grant.kv_device)
            batch.unstarted = {self._weights_teams[device]: part for part, device in enumerate(devices)}
        batch.parts = len(batch.unstarted)
