"""In front of the application: what is answered before there is a model, and where a proxy mounts it."""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fourfold.server.errors import unavailable
from fourfold.server.replies import send_error

LOADING = "the model is loading"


class Front:
    """ASGI. Bodies are not read before there is an application."""

    def __init__(self) -> None:
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.app is not None:
            await self.app(scope, receive, send)
        elif scope["path"] == "/health":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/ready":
            await JSONResponse({"status": "starting", "reason": LOADING}, 503)(scope, receive, send)
        else:
            await send_error(scope, receive, send, unavailable(f"{LOADING}; try again later"))


class Mounted:
    """Tells the application below which path a proxy mounts it; requests may come with that path or without."""

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "root_path": self._root_path}, receive, send)
