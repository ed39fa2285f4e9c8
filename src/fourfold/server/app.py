"""The application: routes, and around them from the outside in the log, the keys, the gate and the body's limit."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware

from fourfold.server import chat, completions, operations
from fourfold.server.auth import OPEN_PATHS, Auth, Keys
from fourfold.server.errors import ErrorBody, install_handlers
from fourfold.server.front import Mounted
from fourfold.server.gate import Gate
from fourfold.server.hosts import Hosts
from fourfold.server.limits import BodyLimit
from fourfold.server.log import RequestLog
from fourfold.server.page import OPEN_PATHS as PAGE_PATHS
from fourfold.server.page import STATIC, page_router
from fourfold.server.service import Service

_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be honoured; the message says why."},
    "5XX": {"model": ErrorBody, "description": "The server starts, ends or has failed."},
}


def make_app(
    service: Service,
    keys: Keys,
    *,
    root_path: str = "",
    origins: tuple[str, ...] = (),
    hosts: frozenset[str] | None = None,
) -> FastAPI:
    """`root_path`: below which a proxy mounts it. `origins`: web pages that may ask from elsewhere; none by default.

    `hosts`: by which names it may be asked; None: by any.
    """
    import fourfold

    middleware = [
        Middleware(RequestLog, count=service.metrics.count),
        Middleware(Auth, keys=keys, open_paths=frozenset(OPEN_PATHS) | PAGE_PATHS, open_prefix=STATIC),
        Middleware(Gate, service=service),
        Middleware(BodyLimit, limits=service.limits),
    ]
    if hosts is not None:
        middleware.insert(1, Middleware(Hosts, names=hosts))
    if origins:
        from starlette.middleware.cors import CORSMiddleware

        cors = Middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # OpenAI's client in a browser sends a dozen of its own
        )
        middleware.insert(1, cors)  # outside the keys: a browser asks first, and without one
    if root_path:
        middleware.insert(0, Middleware(Mounted, root_path=root_path))
    app = FastAPI(
        title="fourfold",
        version=fourfold.__version__,
        description="One large language model, by OpenAI's interface.",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        middleware=middleware,
    )
    app.state.service = service
    install_handlers(app)
    for router in (chat.router, completions.router):
        app.include_router(router, responses=_ERRORS)
    app.include_router(operations.router, responses=_ERRORS)
    app.include_router(page_router())
    return app
