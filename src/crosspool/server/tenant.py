"""Whose request it is: only requests of one tenant use what each other has computed."""

from __future__ import annotations

from hashlib import blake2b

from starlette.requests import Request

TENANT_BYTES = 16


def tenant(request: Request, cache_salt: str | None) -> bytes:
    """The same bytes for requests with the same API key, in whatever form it came, and the same salt.

    The key itself does not leave this process.
    """
    _, _, key = request.headers.get("authorization", "").partition(" ")
    digest = blake2b(key.strip().encode(), digest_size=TENANT_BYTES).digest()
    return blake2b(
        (cache_salt or "").encode(errors="surrogatepass"), key=digest, digest_size=TENANT_BYTES
    ).digest()
