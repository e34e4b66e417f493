from __future__ import annotations

import msgspec
import pytest

from crosspool.core.config import EngineConfig, ModelConfig, PoolConfig
from crosspool.core.errors import (
    ConfigError,
    CorruptCheckpointError,
    CrossPoolError,
    EngineDeadError,
    InvariantError,
    ModelLoadError,
    ModelUnavailableError,
    OutOfMemoryError,
    OverloadedError,
    RequestTooLargeError,
)
from crosspool.core.ids import ModelIndex, Nanoseconds, RequestId
from crosspool.core.info import EngineInfo, EngineStats, LoadProgress, ModelInfo, ModelStats
from crosspool.core.request import EngineOutput, FinishReason, Request, TokenLogprobs
from crosspool.core.sampling import SamplingParams
from crosspool.core.topology import Sharding
from crosspool.server import messages
from crosspool.server.messages import Codec

pytestmark = pytest.mark.unit

REQUEST = Request(
    id=RequestId(7),
    model=ModelIndex(1),
    prompt_token_ids=(1, 2, 3),
    sampling=SamplingParams(temperature=0.5, stop=("a", "é"), seed=-5, logprobs=2),
    max_tokens=9,
    seed=2**63 - 1,
    stop_token_ids=frozenset({4, 5}),
    arrival=Nanoseconds(0),
)
INFO = EngineInfo(
    (ModelInfo("a", ModelIndex(0), "/a", eos_token_ids=(1,)),), ("cpu:0",), ("cpu:1",), 1, 2, 3, 4, 5
)
STATS = EngineStats((ModelStats("a", finished={"stop": 3}), ModelStats("b")), 10, 4, 3, 4096, 8, 7)
CONFIG = EngineConfig(
    models=(ModelConfig("a", "/a", pinned=True), ModelConfig("b", "/b", tbt_target=Nanoseconds(5))),
    pools=PoolConfig(kv_pool_bytes=123),
    weights_devices=("cpu:0", "cpu:1"),
    sharding=Sharding.TENSOR,
)

COMMANDS = [
    messages.Start(CONFIG),
    messages.Submit(REQUEST),
    messages.Finish(RequestId(7), 3),
    messages.Abort(RequestId(7)),
    messages.StatsQuery(-1),
    messages.Shutdown(),
]
EVENTS = [
    messages.Progress(LoadProgress("a", 1, 2, "why")),
    messages.Ready(INFO),
    messages.Outputs(
        (
            EngineOutput(RequestId(7), (5, 6), (TokenLogprobs(-0.5, 2, ((5, -0.5),)),) * 2),
            EngineOutput(RequestId(8), (), finish_reason=FinishReason.ERROR, error="why", cached_tokens=4),
        )
    ),
    messages.Rejected(RequestId(7), "OverloadedError", "full"),
    messages.Stats(4, STATS),
    messages.Failed("ConfigError", "no"),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda message: type(message).__name__)
def test_a_command_arrives_as_it_was_sent(command: messages.Command) -> None:
    assert Codec().command(Codec().encode(command)) == command


@pytest.mark.parametrize("event", EVENTS, ids=lambda message: type(message).__name__)
def test_an_event_arrives_as_it_was_sent(event: messages.Event) -> None:
    assert Codec().event(Codec().encode(event)) == event


@pytest.mark.parametrize("data", [b"", b"\x80\x04.", b"\x81\xa4type\xa4Evil", Codec().encode(EVENTS[0])])
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        Codec().command(data)


def test_an_event_with_a_field_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        Codec().event(msgspec.msgpack.encode({"type": "Failed", "kind": "x", "message": 3}))


@pytest.mark.parametrize(
    "error",
    [
        RequestTooLargeError("10 is more than 5", parameter="max_tokens"),
        OverloadedError("full"),
        ModelUnavailableError("model a does not serve"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_rejection_becomes_the_same_error_again(error: CrossPoolError) -> None:
    rejected = Codec().event(Codec().encode(messages.reject(RequestId(3), error)))
    assert isinstance(rejected, messages.Rejected)
    again = messages.to_error(rejected)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert getattr(again, "parameter", None) == getattr(error, "parameter", None)


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ConfigError("no"), ConfigError, "no"),
        (OutOfMemoryError("pool", needed=10, free=5), ConfigError, "10 bytes needed, 5 bytes free"),
        (CorruptCheckpointError("a.safetensors is cut off"), ModelLoadError, "a.safetensors is cut off"),
        (InvariantError("page 3 twice"), EngineDeadError, "page 3 twice"),
        (RuntimeError("boom"), EngineDeadError, "RuntimeError: boom"),
    ],
)
def test_a_failure_says_whether_the_configuration_is_at_fault(
    error: Exception, kind: type[CrossPoolError], text: str
) -> None:
    again = messages.to_error(messages.fail(error))
    assert type(again) is kind
    assert text in str(again)
