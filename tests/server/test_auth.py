from __future__ import annotations

import pytest

from crosspool.server.config import ServerConfig

pytestmark = pytest.mark.integration

KEY = "a-long-secret"


@pytest.fixture
async def guarded(start_application):
    return await start_application(ServerConfig(api_key=KEY))


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        KEY,
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        f"Basic {KEY}",
    ],
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/ready"),
        ("GET", "/metrics"),
        ("GET", "/version"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("GET", "/health/"),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
    ],
)
async def test_every_route_wants_the_key(guarded, method: str, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header}
    response = await guarded.client.request(method, path, headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_the_key_opens_every_route(guarded) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/v1/models", "/ready", "/metrics", "/version"):
        assert (await guarded.client.get(path, headers=headers)).status_code == 200
    answer = await guarded.client.post(
        "/v1/completions", json={"model": "tiny", "prompt": "a"}, headers=headers
    )
    assert answer.status_code == 200


async def test_health_is_open(guarded) -> None:
    assert (await guarded.client.get("/health")).status_code == 200


async def test_a_key_that_is_not_ascii_is_refused_not_an_error(guarded) -> None:
    response = await guarded.client.get("/ready", headers={"Authorization": b"Bearer \xff\xfe"})
    assert response.status_code == 401
