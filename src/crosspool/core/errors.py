"""Every error that CrossPool raises on purpose, in one tree.

::

    CrossPoolError
    ├── ConfigError                   the operator's configuration cannot work
    ├── ModelLoadError                one model cannot be loaded; the others are not touched
    │   ├── UnsupportedModelError     no family for the architecture, or a variant it does not cover
    │   ├── CorruptCheckpointError    a file is missing, truncated or not what its name says
    │   ├── MissingTensorError        a weight that the family needs is not in the checkpoint
    │   └── TensorShapeError          a weight has another shape or dtype than the config implies
    ├── OutOfMemoryError              bytes needed, free and evictable
    ├── DeviceError                   a device has failed: nothing more runs on it in this process
    ├── RequestError                  the client's request is at fault (HTTP 4xx)
    │   ├── InvalidRequestError       a field is missing, of a wrong type or out of range (400)
    │   ├── RequestTooLargeError      longer than the model's context or the whole KV pool (400)
    │   └── ModelNotFoundError        no such model (404)
    ├── OverloadedError               no room in the queues now (503, Retry-After)
    ├── ModelUnavailableError         the model is known but does not serve (503)
    ├── EngineDeadError               the engine process is gone (503)
    └── InvariantError                a bug in CrossPool: a state that must not exist
"""

from __future__ import annotations


class CrossPoolError(Exception):
    """Base of the tree."""


class ConfigError(CrossPoolError):
    """The operator's configuration cannot work."""


class ModelLoadError(CrossPoolError):
    """One model cannot be loaded; the others are not touched."""


class UnsupportedModelError(ModelLoadError):
    """No family for the architecture, or a variant that the family does not cover."""


class CorruptCheckpointError(ModelLoadError):
    """A file is missing, truncated, or not what its name says."""


class MissingTensorError(ModelLoadError):
    """A weight that the family needs is not in the checkpoint."""


class TensorShapeError(ModelLoadError):
    """A weight has another shape or dtype than the config implies."""


class OutOfMemoryError(CrossPoolError):
    """A pool or the machine cannot give what was asked.

    ``needed``, ``free`` and ``evictable`` are bytes; ``evictable`` is what unloading idle models would free.
    """

    def __init__(self, what: str, *, needed: int, free: int, evictable: int = 0) -> None:
        super().__init__(
            f"{what}: {needed:,} bytes needed, {free:,} bytes free, {evictable:,} bytes evictable"
        )
        self.needed = needed
        self.free = free
        self.evictable = evictable


class DeviceError(CrossPoolError):
    """A device has failed, and with it all that was in its streams: nothing more runs on it in this
    process."""


class RequestError(CrossPoolError):
    """The client's request is at fault. ``parameter`` names the field, where there is one."""

    def __init__(self, message: str, *, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


class InvalidRequestError(RequestError):
    """A field is missing, of a wrong type, or out of range."""


class RequestTooLargeError(RequestError):
    """Longer than the model's context or than the whole KV pool."""


class ModelNotFoundError(RequestError):
    """No model of that name."""


class OverloadedError(CrossPoolError):
    """No room in the queues now; trying again later may succeed."""


class ModelUnavailableError(CrossPoolError):
    """The model is known but does not serve, for instance because it failed to load."""


class EngineDeadError(CrossPoolError):
    """The engine process is gone; its requests are lost."""


class InvariantError(CrossPoolError):
    """A bug in CrossPool: a state that must not exist."""
