"""By which names the server may be asked: a page elsewhere can have its own name lead here (DNS rebinding)."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from fourfold.server.auth import OPEN_PATHS, route_path
from fourfold.server.errors import ApiError
from fourfold.server.replies import send_error

LOCAL = frozenset({"localhost", "127.0.0.1", "::1", ""})


class Hosts:
    """Refuses every other name, where a key does not tell friend from stranger."""

    def __init__(self, app: ASGIApp, names: frozenset[str]) -> None:
        """`names`: in small letters, without ports."""
        self._app, self._names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and route_path(scope) not in OPEN_PATHS:
            name = _name(dict(scope["headers"]).get(b"host", b"").decode("latin-1"))
            if name not in self._names:
                message = f"this server does not go by the name {name[:200]!r}; start it with --allowed-host NAME"
                await send_error(scope, receive, send, ApiError(403, message, code="unknown_host"))
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """Without its port, and an address of IPv6 without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()
