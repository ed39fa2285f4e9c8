"""Lets requests to the model in: none before it is ready or while the server ends, and not too many at a time."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from fourfold.server.errors import ApiError, too_busy
from fourfold.server.operations import check_open
from fourfold.server.replies import send_error
from fourfold.server.service import Service


class Gate:
    """Counts what is under way, too, so that a server that ends knows when it may."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        service = self._service
        try:
            check_open(service)
            if service.n_requests >= service.limits.max_requests:
                raise too_busy(f"{service.n_requests} requests are under way, as many as may be: try again later")
        except ApiError as error:
            await send_error(scope, receive, send, error)
            return
        service.n_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            service.n_requests -= 1
