"""What the API process and the cell say to each other: tagged structs in MessagePack, never pickle."""

from __future__ import annotations

import msgspec

from crosspool.core.config import EngineConfig
from crosspool.core.errors import (
    ConfigError,
    CrossPoolError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    ModelUnavailableError,
    OutOfMemoryError,
    OverloadedError,
    RequestError,
    RequestTooLargeError,
)
from crosspool.core.ids import RequestId
from crosspool.core.info import EngineInfo, EngineStats, LoadProgress
from crosspool.core.request import EngineOutput, Request


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first message to a cell: what to build."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Run a request. Answered by Outputs, or once by Rejected."""

    request: Request


class Finish(msgspec.Struct, frozen=True, tag=True):
    """End a request after its first ``at_token`` output tokens."""

    request: RequestId
    at_token: int


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request and free what it holds."""

    request: RequestId


class StatsQuery(msgspec.Struct, frozen=True, tag=True):
    """Ask for figures. The engine's own loop answers, so this is the heartbeat too."""

    query: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Exit. Requests that still run are lost."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far loading has come."""

    progress: LoadProgress


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine is built and takes requests."""

    info: EngineInfo


class Outputs(msgspec.Struct, frozen=True, tag=True):
    """What one step of the engine made, for any number of requests."""

    outputs: tuple[EngineOutput, ...]


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """The engine did not take a request. ``kind`` is the name of a class in core/errors.py."""

    request: RequestId
    kind: str
    message: str
    parameter: str | None = None


class Stats(msgspec.Struct, frozen=True, tag=True):
    """The answer to a StatsQuery."""

    query: int
    stats: EngineStats


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The cell's last message when the engine cannot be built or has broken down."""

    kind: str
    message: str


Command = Start | Submit | Finish | Abort | StatsQuery | Shutdown
Event = Progress | Ready | Outputs | Rejected | Stats | Failed

REJECTIONS: tuple[type[CrossPoolError], ...] = (OverloadedError, ModelUnavailableError, RequestError)
"""What Engine.add raises about one request; any other error is the end of the cell."""

_KINDS: dict[str, type[CrossPoolError]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        EngineDeadError,
        InvalidRequestError,
        ModelLoadError,
        ModelNotFoundError,
        ModelUnavailableError,
        OverloadedError,
        RequestError,
        RequestTooLargeError,
    )
}


def reject(request: RequestId, error: CrossPoolError) -> Rejected:
    """The message for an error that Engine.add raised."""
    return Rejected(request, type(error).__name__, str(error), getattr(error, "parameter", None))


def fail(error: Exception) -> Failed:
    """The message for an error that ends the cell.

    Too little memory for the pools is a matter of configuration; whatever is not the operator's to mend is an
    EngineDeadError.
    """
    if isinstance(error, ModelLoadError):
        return Failed(ModelLoadError.__name__, str(error))
    if isinstance(error, ConfigError | OutOfMemoryError):
        return Failed(ConfigError.__name__, str(error))
    return Failed(EngineDeadError.__name__, f"{type(error).__name__}: {error}")


def to_error(message: Rejected | Failed) -> CrossPoolError:
    """The error that a message stands for."""
    kind = _KINDS.get(message.kind, CrossPoolError)
    if issubclass(kind, RequestError):
        parameter = message.parameter if isinstance(message, Rejected) else None
        return kind(message.message, parameter=parameter)
    return kind(message.message)


class Codec:
    """Encodes both directions and decodes each by its union. For one thread."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
        self._events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)

    def encode(self, message: Command | Event) -> bytes:
        return self._encoder.encode(message)

    def command(self, data: bytes) -> Command:
        """Raises msgspec.DecodeError for anything but a command."""
        return self._commands.decode(data)

    def event(self, data: bytes) -> Event:
        """Raises msgspec.DecodeError for anything but an event."""
        return self._events.decode(data)
