"""Configuration of the server: frozen, finite by default, each part given its own slice."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from crosspool.core.errors import ConfigError

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """What clients may take, counted before any of their text is rendered or tokenized. Times in seconds.

    ``max_requests`` requests and ``max_admitted_bytes`` of bodies may be in progress at once; one body may
    have ``max_body_bytes``, the headers of a request ``max_header_bytes``. One request may have
    ``max_prompts`` prompts and ask for ``max_choices`` choices, those of all its prompts together: one for
    more than a model's queue takes could never be served. ``header_timeout`` and ``body_timeout`` bound how
    long a client may take to send them. ``first_token_timeout`` bounds the preparing of the prompt, and then
    the wait in the queue and the reading of the prompt together; ``token_timeout`` the gap between two tokens
    once every choice has begun; ``total_timeout`` the whole request, a slow reader included. A client that is
    refused for overload is asked to come back after ``retry_after``.
    """

    max_requests: int = 1024
    max_admitted_bytes: int = 256 * MIB
    max_body_bytes: int = 4 * MIB
    max_header_bytes: int = 64 * 1024
    max_prompts: int = 128
    max_choices: int = 256
    header_timeout: float = 30.0
    body_timeout: float = 60.0
    first_token_timeout: float = 600.0
    token_timeout: float = 120.0
    total_timeout: float = 3600.0
    retry_after: int = 1

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.max_body_bytes > self.max_admitted_bytes:
            raise ConfigError(
                f"max_body_bytes {self.max_body_bytes:,} is above max_admitted_bytes "
                f"{self.max_admitted_bytes:,}"
            )


@dataclass(frozen=True, slots=True)
class SupervisionConfig:
    """How the engine process is watched. Times in seconds.

    A cell that does not answer for ``hang_timeout``, or that while loading reports no progress for
    ``load_timeout``, is killed. A cell that dies is replaced after a quarter of a second, one that dies again
    within ``stable_after`` of being ready after a pause that doubles up to ``max_restart_delay``. After
    ``dead_after`` such deaths in a row the engine counts as dead, though starting it is still tried.
    ``shutdown_timeout`` bounds an orderly end.
    """

    hang_timeout: float = 30.0
    load_timeout: float = 600.0
    stable_after: float = 60.0
    max_restart_delay: float = 8.0
    dead_after: int = 5
    shutdown_timeout: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(self)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """One HTTP server. ``port`` 0 lets the system choose. ``api_key`` covers every route but /health.

    On SIGTERM or SIGINT running requests have ``drain_timeout`` seconds to finish.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    drain_timeout: float = 30.0
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be within 0 and 65535, not {self.port}")
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ConfigError("the API key must be ASCII text that is not empty")
        if self.drain_timeout < 0:
            raise ConfigError(f"drain_timeout must be at least 0, not {self.drain_timeout}")


def _require_positive(config: LimitsConfig | SupervisionConfig) -> None:
    for entry in fields(config):
        if getattr(config, entry.name) <= 0:
            raise ConfigError(f"{entry.name} must be above 0, not {getattr(config, entry.name)}")
