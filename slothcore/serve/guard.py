"""Who may ask."""

import hmac
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from slothcore.serve.errors import ApiError

# The names under which a browser can reach a server on loopback; any other one was turned here by a stranger's DNS.
LOOPBACK_NAMES = frozenset(("localhost", "127.0.0.1", "[::1]"))


class Guard:
    """Lets those requests through that are allowed: with the key where there is one, and from this machine."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, checks_host: bool) -> None:
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._checks_host = checks_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._check(scope["path"], dict(scope["headers"]))
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, path: str, headers: Mapping[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self._checks_host and name not in LOOPBACK_NAMES:
            raise ApiError(403, f"this server answers on loopback only, and was asked for as {host!r}; see --host")
        if self._key is None or not path.startswith("/v1/"):
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not key:
            raise ApiError(401, "the API key is missing; send it as Authorization: Bearer KEY", code="invalid_api_key")
        if not hmac.compare_digest(key.strip(), self._key):
            raise ApiError(401, "the API key is not the one that this server was given", code="invalid_api_key")
